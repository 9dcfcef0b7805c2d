package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/udev"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
)

const (
	// lookAnyway is how often disks are looked at though the kernel says when one comes:
	// an event that was missed costs that much, and nothing else.
	lookAnyway = 30 * time.Second
	// lookSoon is how long after an event a disk that is missing is looked for again, at
	// first: udevd may still have to make the link that names it.
	lookSoon = 100 * time.Millisecond
	// lookApart is how long two looks are apart at least.
	lookApart = 50 * time.Millisecond
)

// disks watches the disks that the configuration names. It opens none of them: it wakes
// whoever has one that came, went or has another size, and they look for themselves. Events
// of the kernel are only the occasion for a look, so a missed one stops nothing. A nil *disks
// knows of none.
type disks struct {
	log     *slog.Logger
	publish func(volume, replica, kind, message string)
	look    func(name string) (blockdev.Identity, error) // tests see others
	there   func(seen blockdev.Identity) bool
	now     func() time.Time
	events  chan struct{} // room for one

	mu     sync.Mutex
	all    []*disk
	hears  bool // the kernel tells of events
	looked bool // once, at least
}

// disk is one that the configuration names.
type disk struct {
	name   string
	owners []diskOwner

	is    bool
	seen  blockdev.Identity // when it was there last
	since time.Time         // when it was seen to go; zero: it was not there from the start
	was   int64             // its size in bytes, before that changed; 0: it did not
}

// diskOwner is a volume, or a replica of one, that a disk belongs to.
type diskOwner struct {
	volume, replica string
	wake            func()
}

func newDisks(a *Agent) *disks {
	d := &disks{log: a.log, publish: a.hub.publish, look: udev.Look, there: udev.There, now: time.Now, events: make(chan struct{}, 1)}
	for _, m := range a.volumes {
		for _, name := range []string{m.config.Device, m.config.CowDevice, m.config.MetadataDevice} {
			d.add(name, diskOwner{m.config.Name, "", func() { m.wake(); m.roles.wake() }})
		}
		for _, r := range m.replicas {
			d.add(r.config.Device, diskOwner{m.config.Name, r.config.Name, r.wake})
		}
	}
	if a.peers != nil {
		for _, s := range a.peers.volumes {
			d.add(s.config.Device, diskOwner{s.config.Name, "", s.replica.wake})
		}
	}
	return d
}

func (d *disks) add(name string, owner diskOwner) {
	if name == "" {
		return
	}
	one := d.find(name)
	if one == nil {
		one = &disk{name: name}
		d.all = append(d.all, one)
	}
	for i, o := range one.owners {
		if o.volume == owner.volume && o.replica == owner.replica { // a disk of either role
			one.owners[i].wake = func() { o.wake(); owner.wake() }
			return
		}
	}
	one.owners = append(one.owners, owner)
}

// find is nil where the configuration names no such disk.
func (d *disks) find(name string) *disk {
	for _, one := range d.all {
		if one.name == name {
			return one
		}
	}
	return nil
}

// run watches until ctx ends.
func (d *disks) run(ctx context.Context) {
	var listening sync.WaitGroup
	defer listening.Wait()
	listening.Go(func() { d.listen(ctx) })
	wait := time.Duration(0)
	for {
		missing := d.lookAtAll()
		least := time.NewTimer(lookApart)
		again := time.NewTimer(d.nextLook(wait, missing))
		select {
		case <-ctx.Done():
		case <-d.events:
			wait = lookSoon
		case <-again.C:
			wait = min(2*wait, lookAnyway)
		}
		again.Stop()
		select {
		case <-ctx.Done():
			least.Stop()
			return
		case <-least.C:
		}
	}
}

// nextLook is when to look again if nothing is heard: soon after an event while a disk is
// missing, and ever less often.
func (d *disks) nextLook(wait time.Duration, missing bool) time.Duration {
	longest := d.patience("")
	if wait == 0 || !missing {
		return longest
	}
	return min(wait, longest)
}

// patience is how long whoever waits for a disk waits before it looks by itself. A path that
// is no device's node is not told of by the kernel.
func (d *disks) patience(name string) time.Duration {
	if d == nil {
		return retryEvery
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.hears && (name == "" || udev.IsName(name) || strings.HasPrefix(name, "/dev/")) {
		return lookAnyway
	}
	return retryEvery
}

// whenThere says when a missing disk is noticed.
func (d *disks) whenThere(name string) string {
	if wait := d.patience(name); wait == retryEvery {
		return fmt.Sprintf("it is looked for every %s", wait)
	}
	return "it is used as soon as it is there"
}

// listen hears the kernel's events until ctx ends.
func (d *disks) listen(ctx context.Context) {
	said := false
	for ctx.Err() == nil {
		l, err := udev.Listen()
		if err == nil {
			stop := context.AfterFunc(ctx, func() { l.Close() })
			d.hear(true) // whatever came before is looked at now
			err = d.listenTo(l)
			d.hear(false)
			stop()
			err = errors.Join(err, l.Close())
		}
		if ctx.Err() != nil {
			return
		}
		if !said {
			d.log.Warn("the kernel's events of devices are not heard; disks are looked at now and then instead", "every", retryEvery, "error", err)
			said = true
		}
		select {
		case <-ctx.Done():
		case <-time.After(retryEvery):
		}
	}
}

// listenTo returns when no more can be heard.
func (d *disks) listenTo(l *udev.Listener) error {
	for {
		e, err := l.Next()
		switch {
		case errors.Is(err, udev.ErrLost):
			d.log.Debug("events of devices were lost; all disks are looked at", "error", err)
		case err != nil:
			return err
		case d.ours(e):
			continue
		}
		d.wake()
	}
}

// ours says that an event is only of a volume's own devices: each cut makes some.
func (d *disks) ours(e udev.Event) bool {
	if !strings.HasPrefix(e.Name, "dm-") {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, one := range d.all {
		// One that is not there may be a link to such a device.
		if mapped := strings.HasPrefix(one.seen.Disk, "dm-"); mapped || !one.is && !udev.IsName(one.name) {
			return false
		}
	}
	return true
}

func (d *disks) hear(hears bool) {
	d.mu.Lock()
	d.hears = hears
	d.mu.Unlock()
	d.wake()
}

// wake has all disks looked at.
func (d *disks) wake() {
	select {
	case d.events <- struct{}{}:
	default:
	}
}

// lookAtAll looks at each disk, and says whether one is missing.
func (d *disks) lookAtAll() (missing bool) {
	for _, one := range d.all {
		// Nothing but this changes what was seen, so it may be read; and mu is not held while
		// a disk may be waited for.
		now, err := d.look(one.name)
		still := err != nil && one.is && d.there(one.seen)
		d.mu.Lock()
		told := d.note(one, now, err, still)
		missing = missing || !one.is
		d.mu.Unlock()
		for _, tell := range told {
			tell()
		}
	}
	d.mu.Lock()
	d.looked = true
	d.mu.Unlock()
	return missing
}

// note takes what a look at a disk found, or that it failed and whether the disk is still
// there, and returns what is to be told of it, once mu is not held any more.
func (d *disks) note(one *disk, now blockdev.Identity, err error, still bool) (told []func()) {
	before := *one
	switch {
	case err != nil && still:
		return nil // its name was lost, a link for one, or has become another's, too
	case err != nil:
		one.is = false
	default:
		one.is, one.seen = true, now
	}
	same := before.is && one.is && udev.Same(before.seen, one.seen)
	if !d.looked || !before.is && !one.is || same && before.seen.SizeBytes == one.seen.SizeBytes {
		return nil
	}
	say := func(kind, words string) {
		told = append(told, func() {
			for _, o := range one.owners {
				d.log.Info("disk", "volume", o.volume, "replica", o.replica, "event", kind, "disk", one.name, "what", words)
				d.publish(o.volume, o.replica, kind, words)
			}
		})
	}
	if before.is && !same {
		one.since, one.was = d.now(), 0
		say("disk-gone", describe(one.name, before.seen)+" is gone")
	}
	switch {
	case same:
		if one.was == 0 {
			one.was = before.seen.SizeBytes
		}
		if one.was == one.seen.SizeBytes {
			one.was = 0
		}
		say("disk-resized", fmt.Sprintf("%s has %d bytes, before %d", describe(one.name, one.seen), one.seen.SizeBytes, before.seen.SizeBytes))
	case one.is:
		one.was = 0
		say("disk-appeared", fmt.Sprintf("%s is there, with %d bytes", describe(one.name, one.seen), one.seen.SizeBytes))
	}
	return append(told, func() {
		for _, o := range one.owners {
			o.wake()
		}
	})
}

// describe is a disk's name, and where it is.
func describe(name string, id blockdev.Identity) string {
	if id.Path == name {
		return name
	}
	return name + " (" + id.Path + ")"
}

// goneSince is when a disk was seen to go; false: it is there, or was not there from the start.
func (d *disks) goneSince(name string) (time.Time, bool) {
	if d == nil {
		return time.Time{}, false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	one := d.find(name)
	if one == nil || one.since.IsZero() {
		return time.Time{}, false
	}
	return one.since, true
}

// resized is the size of a disk in bytes, and the one it had before; false: it is as it was
// when it was opened.
func (d *disks) resized(name string) (is, was int64, ok bool) {
	if d == nil {
		return 0, 0, false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	one := d.find(name)
	if one == nil || !one.is || one.was == 0 {
		return 0, 0, false
	}
	return one.seen.SizeBytes, one.was, true
}

// settle forgets that a disk has another size: whoever has it knows.
func (d *disks) settle(name string) {
	if d == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if one := d.find(name); one != nil {
		one.was = 0
	}
}

// resizedWords says that a disk has another size than what is on it, and what to do.
func (d *disks) resizedWords(name, volume string) (words, advice string) {
	is, was, ok := d.resized(name)
	switch {
	case !ok:
		return "", ""
	case is > was:
		return fmt.Sprintf("%s has grown from %s to %s; what is on it is as large as before", name, config.FormatSize(was), config.FormatSize(is)),
			"to use all of it, once the volume's other disks have grown, too: blockferry resize " + volume
	}
	return fmt.Sprintf("%s has shrunk from %s to %s; what was behind that is lost", name, config.FormatSize(was), config.FormatSize(is)),
		"have it be as large as before"
}

// absentError says that a disk is not there.
type absentError struct {
	name  string
	since time.Time // zero: not since the agent's start
	err   error     // never nil
}

func (e *absentError) Error() string {
	if e.since.IsZero() {
		return e.err.Error()
	}
	return fmt.Sprintf("%s is gone since %s: %v", e.name, utc(e.since), e.err)
}

func (e *absentError) Unwrap() error { return e.err }

// absent is an error about a disk that is not there, with the time when it went; any other
// error is as it was.
func (d *disks) absent(name string, err error) error {
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	since, _ := d.goneSince(name)
	return &absentError{name, since, err}
}

// errWent says that a disk went while it was in use.
var errWent = fmt.Errorf("what is open is not there any more: %w", fs.ErrNotExist)

// lost is the words about an SSD that went while its volume is up, and what to do; "": it is
// there. It may read what is in its place.
func (m *managed) lost(on blockdev.Identity) (words, advice string) {
	if udev.There(on) {
		return "", ""
	}
	d, v := m.agent.disks, m.config
	words = describe(v.Device, on) + " is gone"
	if since, ok := d.goneSince(v.Device); ok {
		words += " since " + utc(since)
	}
	down := "close what uses the volume, then: blockferry down --force " + v.Name
	advice = "attach it again, " + down + ", blockferry up " + v.Name + "; if it is lost for good, attach a blank one; replicas keep what they have"
	disk, err := udev.Open(v.Device, blockdev.OpenOptions{})
	if err != nil {
		return words, advice
	}
	defer disk.Close()
	words += "; in its place is " + disk.Name()
	content, why := volume.Inspect(disk)
	switch {
	case content == volume.Blank:
		return words + ", a blank disk: " + why, "nothing is written to it by itself; to fill it from a replica, " + down + ", blockferry restore " + v.Name
	case v.Attach: // attaching it tells whether it is the volume's
		return words, "if that is the right disk, mount it again, then: blockferry down --force " + v.Name + ", blockferry up " + v.Name
	case content == volume.Labelled:
		if l, err := volume.ReadLabel(disk); err == nil && l.UUID == m.uuidNow() {
			return words + ", which holds this volume", "it came back; " + down + ", blockferry up " + v.Name
		}
	}
	return words + ": " + why, "nothing is written to it; attach the right disk"
}

// patience is how long to wait for disks of the volume that are not there.
func (m *managed) patience() time.Duration {
	wait := lookAnyway
	for _, name := range []string{m.config.Device, m.config.CowDevice, m.config.MetadataDevice} {
		if name != "" {
			wait = min(wait, m.agent.disks.patience(name))
		}
	}
	return wait
}

func (m *managed) uuidNow() volume.UUID {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.uuid
}

// lookAtDisk notes whether the disk of a volume that is up is still there, once more if that
// is news; op is held.
func (m *managed) lookAtDisk() {
	now, _ := udev.Look(m.config.Device)
	m.mu.Lock()
	on, before, same := m.on, m.lostWords, now == m.lostFor
	m.mu.Unlock()
	if before != "" && same && !udev.There(on) {
		return // it was read already
	}
	words, advice := m.lost(on)
	m.mu.Lock()
	m.lostWords, m.lostAdvice, m.lostFor = words, advice, now
	m.mu.Unlock()
	if words == before {
		return
	}
	if words == "" {
		m.log.Info("the volume's disk is there")
		return
	}
	m.log.Error("the volume's disk", "reason", words, "advice", advice)
	m.agent.hub.publish(m.config.Name, "", "volume-disk-lost", words)
}

// ambiguousAdvice is for udev.ErrAmbiguous.
const ambiguousAdvice = "nothing is written; name one of them in the configuration and restart the agent, or detach the other"

// pathOf is the path of a disk that the configuration names; "" is none.
func pathOf(name string) (string, error) {
	if name == "" {
		return "", nil
	}
	return udev.Path(name)
}

// diskPaths are the paths of a volume's own disks.
type diskPaths struct{ device, cow, metadata string }

func pathsOf(v *config.Volume) (p diskPaths, err error) {
	for _, one := range []struct {
		name string
		path *string
	}{{v.Device, &p.device}, {v.CowDevice, &p.cow}, {v.MetadataDevice, &p.metadata}} {
		if *one.path, err = pathOf(one.name); err != nil {
			return p, err
		}
	}
	return p, nil
}

// openOffline opens the disk of a volume that is down.
func openOffline(name string) (*volume.Offline, error) {
	path, err := pathOf(name)
	if err != nil {
		return nil, err
	}
	return volume.OpenOffline(path)
}

// missing says that a disk is not there, and what to do; "": it is, or can't be looked for.
func (d *disks) missing(name string) (words, advice string) {
	path, err := pathOf(name)
	if err == nil {
		_, err = os.Stat(path)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", ""
	}
	words = name + " is not there"
	if since, ok := d.goneSince(name); ok {
		words += ", since " + utc(since)
	}
	if udev.IsName(name) {
		words += ": " + err.Error()
	}
	return words, "attach the disk; " + d.whenThere(name)
}

func utc(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05Z") }
