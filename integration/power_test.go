package integration

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/volume"
	"blockferry/protocol"
)

const (
	// powerLossesVar is how often the power goes in each test, powerSeedVar
	// what is drawn from: for longer runs and for others.
	powerLossesVar = "BLOCKFERRY_POWER_LOSSES"
	powerSeedVar   = "BLOCKFERRY_POWER_SEED"

	powerDiskBytes = 128 << 20
)

func powerNumber(t *testing.T, variable string, otherwise int) int {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("%s=%s: want a number from 1", variable, text)
	}
	return n
}

// powerRig is a volume with one replica, both on disks that lose power, run
// by the built binary. Its writer's history goes on over all losses.
type powerRig struct {
	*cli
	mains    *mains
	ssd, ebs *volatileDisk
	marks    *volatileDisk // nil: on the SSD
	areas    volume.Areas  // of the SSD, from its label

	h history
	// flushed writes of the history are on the SSD whatever happened; of those
	// up to issued any part may be.
	flushed, issued uint64
	fulls           int // full copies that were called for

	lostAt time.Time // the last loss
}

// newPowerRig makes the disks. With marks the era metadata has a third one:
// then its flushes do nothing for the SSD.
func newPowerRig(t *testing.T, marks bool, size string) *powerRig {
	t.Helper()
	debug.SetGCPercent(25)
	seed := uint64(powerNumber(t, powerSeedVar, 1))
	t.Logf("seed %d (%s chooses another)", seed, powerSeedVar)
	p := &powerRig{mains: newMains(seed), fulls: 1}
	p.ssd, p.ebs = p.mains.disk(t, 0, powerDiskBytes), p.mains.disk(t, 1, powerDiskBytes)
	elsewhere := ""
	if marks {
		p.marks = p.mains.disk(t, 2, 8<<20)
		elsewhere = "    metadata-device: " + p.marks.path + "\n"
	}
	p.cli = newCLI(t, fmt.Sprintf("volumes:\n  data:\n    device: %s\n    size: %s\n    cow: 16MiB\n    interval: 300ms\n%s"+
		"    replicas:\n      ebs:\n        device: %s\n        journal: 16MiB\n", p.ssd.path, size, elsewhere, p.ebs.path))
	return p
}

// all are the disks there are.
func (p *powerRig) all() []*volatileDisk {
	if p.marks == nil {
		return []*volatileDisk{p.ssd, p.ebs}
	}
	return []*volatileDisk{p.ssd, p.ebs, p.marks}
}

// create makes the volume.
func (p *powerRig) create(t *testing.T) {
	t.Helper()
	p.must(t, "create")
	label, err := volume.ReadLabel(survivor(p.ssd))
	if err != nil {
		t.Fatal(err)
	}
	p.areas = label.Areas
	p.h = history{Seed: 21, Size: label.Areas.Data.Length, MaxBytes: 64 << 10, Span: 12 << 20, FlushEvery: 100}
}

// diskCopy is a copy of what a disk holds. A replica writes to it from several
// goroutines.
type diskCopy struct {
	name  string
	size  int64
	mu    sync.Mutex // guards pages
	pages diskPages
}

// survivor is what can be read of a disk, or what could if it had power.
func survivor(d *volatileDisk) *diskCopy {
	d.mains.mu.Lock()
	defer d.mains.mu.Unlock()
	if d.dead {
		return &diskCopy{name: "copy of " + d.path, size: d.size, pages: maps.Clone(d.durable)}
	}
	return &diskCopy{name: "copy of " + d.path, size: d.size, pages: maps.Clone(d.view)}
}

var _ blockdev.Device = (*diskCopy)(nil)

func (c *diskCopy) Name() string { return c.name }
func (c *diskCopy) Size() int64  { return c.size }
func (c *diskCopy) Flush() error { return nil }
func (c *diskCopy) Close() error { return nil }

func (c *diskCopy) ReadAt(p []byte, offset int64) (int, error) {
	if err := blockdev.CheckRange(c, "read", offset, int64(len(p))); err != nil {
		return 0, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pages.read(p, offset)
	return len(p), nil
}

func (c *diskCopy) WriteAt(p []byte, offset int64) (int, error) {
	if err := blockdev.CheckRange(c, "write", offset, int64(len(p))); err != nil {
		return 0, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pages.write(bytes.Clone(p), offset)
	return len(p), nil
}

func (c *diskCopy) ZeroOut(offset, length int64) error {
	_, err := c.WriteAt(make([]byte, length), offset)
	return err
}

func (c *diskCopy) Discard(offset, length int64) error { return c.ZeroOut(offset, length) }

// what names a request by what it does in the way of a write.
func (p *powerRig) what(d *volatileDisk, r diskRequest) string {
	at := func(a volume.Area) bool { return r.offset >= a.Offset && r.offset < a.End() }
	magic := func(m string) bool { return bytes.HasPrefix(r.data, []byte(m)) }
	switch {
	case r.flush:
		return "flush"
	case d == p.marks:
		return "mark"
	case d == p.ssd && r.offset < p.areas.Data.Offset:
		return "label"
	case d == p.ssd && at(p.areas.Meta):
		return "mark"
	case d == p.ssd && at(p.areas.Data):
		return "write"
	case d == p.ssd:
		return "copy-out"
	case r.offset < p.areas.Data.Length:
		return "apply"
	case magic("BFSUPER1"):
		// What it is for shows against the copy before, in the other place.
		other := make([]byte, len(r.data))
		d.view.read(other, p.otherSuperblock(r.offset))
		const applied, applying = 152, 208 // epochs
		switch {
		case !bytes.Equal(r.data[applied:applied+8], other[applied:applied+8]):
			return "applied superblock"
		case !allZero(r.data[applying : applying+8]):
			return "apply superblock"
		}
		return "commit superblock"
	case magic("BFCM"):
		return "map"
	case magic("BFJSEGM1") && r.data[52] == 2:
		return "commit"
	}
	return "journal"
}

// matches says whether a request is of a kind: "" any, else what names it, or
// "flush after" such a one, which that flush would make durable.
func (p *powerRig) matches(d *volatileDisk, r diskRequest, kind string) bool {
	after, isFlush := strings.CutPrefix(kind, "flush after ")
	if !isFlush || !r.flush {
		return kind == "" || !isFlush && p.what(d, r) == kind
	}
	return slices.ContainsFunc(d.pending, func(w pendingWrite) bool {
		return p.what(d, diskRequest{offset: w.offset, data: w.data}) == after
	})
}

// otherSuperblock is where the copy is that stands beside the one at an offset.
func (p *powerRig) otherSuperblock(offset int64) int64 {
	if first := p.ebs.size - 1<<20; offset > first {
		return first
	}
	return offset + 512<<10
}

// powerPoint is where in the work of disks and agent the power goes: at one
// of the first few requests of a kind to one of the disks.
type powerPoint struct {
	on   string // ssd, ebs or marks
	what string // "" any request
	few  int
	// state, if set, is what the SSD's label has to say: see labelState.
	state string
}

func (p *powerRig) named(name string) *volatileDisk {
	return map[string]*volatileDisk{"ssd": p.ssd, "ebs": p.ebs, "marks": p.marks}[name]
}

// labelState is what the SSD's label, as it can be read now, says of the
// volume: restoring, verifying, clean, open or none. The disks are locked.
func (p *powerRig) labelState() string {
	label, err := volume.ReadLabel(&diskCopy{name: p.ssd.path, size: p.ssd.size, pages: p.ssd.view})
	if err != nil {
		return "none"
	}
	state, err := protocol.DecodeSourceState(label.State)
	switch {
	case err != nil:
		return "none"
	case state.Restore != nil && state.Restore.Verifying:
		return "verifying"
	case state.Restore != nil:
		return "restoring"
	case state.Clean:
		return "clean"
	}
	return "open"
}

// lose takes the power of some disks away at a point. The channel is closed
// when it is gone.
func (p *powerRig) lose(at powerPoint, victims ...*volatileDisk) <-chan struct{} {
	gone := make(chan struct{})
	left := 0
	p.mains.arm(func(d *volatileDisk, r diskRequest) []*volatileDisk {
		if d != p.named(at.on) || !p.matches(d, r, at.what) || at.state != "" && p.labelState() != at.state {
			return nil
		}
		if left == 0 {
			left = 1 + p.mains.random.IntN(at.few)
		}
		if left--; left > 0 {
			return nil
		}
		p.mains.watch = nil
		p.lostAt = time.Now()
		close(gone)
		return victims
	})
	return gone
}

// awaitLoss waits for a loss of power, and returns the last epoch that the
// agent's status said the replica holds.
func (p *powerRig) awaitLoss(t *testing.T, at powerPoint, gone <-chan struct{}) (epoch uint64) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		select {
		case <-gone:
			return epoch
		default:
		}
		if v, _, ok := p.look(t); ok && v.Replicas[0].Position != nil {
			select {
			case <-gone: // what it says may be of after the loss
			default:
				epoch = v.Replicas[0].Position.Epoch
			}
		}
	}
	t.Fatalf("there was no %s on %s", at.what, at.on)
	return 0
}

// takeDown does to the volume what a reset of its machine does.
func (p *powerRig) takeDown(t *testing.T) {
	t.Helper()
	if p.agent != nil {
		p.kill(t)
	}
	ctl := mapper(t)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		err := volume.Down(ctl, "data")
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// nothingToLose checks that no disk holds anything in its cache: what a command
// said to be done is done for good.
func (p *powerRig) nothingToLose(t *testing.T) {
	t.Helper()
	for _, d := range p.all() {
		if n := d.pendingBytes(); n > 0 {
			t.Errorf("%s would lose %d bytes in a power cut now", d.path, n)
		}
	}
}

func (p *powerRig) powerOn(t *testing.T) {
	t.Helper()
	for _, d := range p.all() {
		d.powerOn(t)
	}
}

// otherFates is how many more ways in which the same cut could have ended are
// judged. In the first each disk kept its newest write alone.
const otherFates = 3

// judge looks at what the disks hold, before anything starts on them, and at
// what they would hold had chance decided otherwise. The replica, recovered,
// must be one point of the history that lies at or after synced, its epoch no
// older than the one given. The SSD must hold what was flushed, and be no
// older than the replica.
func (p *powerRig) judge(t *testing.T, w *writer, synced, epoch uint64) {
	t.Helper()
	k := p.judgeFate(t, survivor(p.ssd), survivor(p.ebs), synced, epoch)
	if i := int(k + 1 - w.first); i >= 0 && i < len(w.begun) {
		var n int64
		for next := k + 1; next <= w.issued(); next++ {
			n += p.h.op(next).Length
		}
		t.Logf("were the SSD gone for good: %d writes lost, %d bytes, of the last %.2f s", w.issued()-k, n, p.lostAt.Sub(w.begun[i]).Seconds())
	}
	other := func(d *volatileDisk, newest bool) *diskCopy {
		if !d.dead {
			return survivor(d)
		}
		return &diskCopy{name: "another fate of " + d.path, size: d.size, pages: p.mains.afterCut(d.before, d.atRisk, newest)}
	}
	for i := range otherFates {
		p.judgeFate(t, other(p.ssd, i == 0), other(p.ebs, i == 0), synced, epoch)
	}
}

func (p *powerRig) judgeFate(t *testing.T, disk, replica *diskCopy, synced, epoch uint64) (k uint64) {
	t.Helper()
	defer debug.FreeOSMemory()
	s, k := p.judgeReplica(t, replica, synced, epoch)
	label, err := volume.ReadLabel(disk)
	if err != nil {
		t.Fatal(err)
	}
	state, err := protocol.DecodeSourceState(label.State)
	if err != nil {
		t.Fatal(err)
	}
	if relation := protocol.Compare(state.Effective(), s.Lineage); relation.Kind != protocol.Ahead {
		t.Errorf("the SSD's history [%v] is %v the replica's [%v]: should be ahead", state.Effective(), relation, s.Lineage)
	}
	data := io.NewSectionReader(disk, label.Areas.Data.Offset, label.Areas.Data.Length)
	if err := judgeSurvivor(data, p.h, max(p.flushed, synced), p.issued); err != nil {
		t.Errorf("the SSD: %v", err)
	}
	if err := judgeSurvivor(data, p.h, k, p.issued); err != nil {
		t.Errorf("the SSD is older than its replica, which holds the writes up to %d: %v", k, err)
	}
	return k
}

// judgeReplica says which write a copy of a replica holds.
func (p *powerRig) judgeReplica(t *testing.T, replica *diskCopy, synced, epoch uint64) (protocol.ReplicaStatus, uint64) {
	t.Helper()
	s := openCopy(t, replica, epoch)
	v, err := judgeImage(replica, p.h)
	if err != nil {
		t.Fatalf("the replica at %v: %v", s.Committed, err)
	}
	if v.Latest < synced || v.K > p.issued {
		t.Fatalf("the replica at %v holds the writes up to %d; %d were synced, %d issued", s.Committed, v.K, synced, p.issued)
	}
	t.Logf("%s comes back at %v: write %d of %d; %d synced, %d flushed", replica.name, s.Committed, v.K, p.issued, synced, p.flushed)
	return s, v.K
}

// openCopy opens a copy of a replica as the agent does, which applies what is
// pending. It must hold the epoch or a later one.
func openCopy(t *testing.T, replica *diskCopy, epoch uint64) protocol.ReplicaStatus {
	t.Helper()
	r, err := protocol.OpenReplica(t.Context(), replica, protocol.OpenOptions{})
	if err != nil {
		t.Fatalf("the replica does not come back: %v", err)
	}
	s := r.Status()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if s.State != protocol.DiskConsistent || s.Committed.Epoch < epoch {
		t.Fatalf("the replica is %v (%s) at %v; status had said that it holds epoch %d", s.State, s.Reason, s.Committed, epoch)
	}
	return s
}

// caughtUp checks that replication goes on from where it stood.
func (p *powerRig) caughtUp(t *testing.T) {
	t.Helper()
	p.await(t, "up to date", time.Minute, upToDate)
	p.must(t, "sync", "--timeout", "60s")
	p.must(t, "verify")
	content := p.logText(t)
	if full, compared := plans(content, "full"), plans(content, "compare"); full != p.fulls || compared != 0 {
		t.Fatalf("it did not catch up incrementally: %d full copies, should be %d; %d comparisons", full, p.fulls, compared)
	}
	if lost := strings.Count(content, "tracking begins anew"); lost != 0 {
		t.Fatalf("tracking was lost %d times", lost)
	}
}

// judgeSurvivor checks what a disk holds after a power cut: every write up to
// flushed, and of those after it, up to issued, any sector.
func judgeSurvivor(image io.ReaderAt, h history, flushed, issued uint64) error {
	newest := make([]uint64, h.Size/sector) // the last flushed write of each sector
	mayBeZero := make([]bool, len(newest))
	for i := range mayBeZero {
		mayBeZero[i] = true
	}
	for k := uint64(1); k <= issued; k++ {
		op := h.op(k)
		for i := op.Offset / sector; i < (op.Offset+op.Length)/sector; i++ {
			if k <= flushed {
				newest[i], mayBeZero[i] = k, op.Zero
			} else if op.Zero {
				mayBeZero[i] = true
			}
		}
	}
	buffer, scratch := make([]byte, 1<<20), make([]byte, sector)
	for offset := int64(0); offset < h.Size; offset += int64(len(buffer)) {
		piece := buffer[:min(int64(len(buffer)), h.Size-offset)]
		if n, err := image.ReadAt(piece, offset); n < len(piece) {
			return err
		}
		for at := int64(0); at < int64(len(piece)); at += sector {
			i := (offset + at) / sector
			k, err := h.sectorNumber(piece[at:at+sector], i, scratch)
			switch {
			case err != nil:
				return err
			case k == 0 && !mayBeZero[i], k != 0 && k < newest[i]:
				return fmt.Errorf("sector %d holds write %d: write %d was flushed and is lost", i, k, newest[i])
			case k > issued:
				return fmt.Errorf("sector %d holds write %d, only %d were issued", i, k, issued)
			}
		}
	}
	return nil
}

// The judge of a disk after a power cut must see one flushed sector that is
// missing, and allow every other.
func TestHarnessJudgeSurvivor(t *testing.T) {
	h := history{Seed: 5, Size: 2 << 20, MaxBytes: 64 << 10}
	at := imagesOf(h)
	const flushed, issued = 400, 440
	image := bytes.Clone(at(flushed))
	for i, later := 0, at(issued); i < len(image); i += 2 * sector { // half of what was not flushed
		copy(image[i:i+sector], later[i:])
	}
	if err := judgeSurvivor(bytes.NewReader(image), h, flushed, issued); err != nil {
		t.Errorf("what a power cut may leave: %v", err)
	}
	if err := judgeSurvivor(bytes.NewReader(at(issued)), h, flushed, issued-1); err == nil {
		t.Error("a write that was never issued was not seen")
	}
	seen := 0
	for i, before := 0, at(flushed-200); i < len(image); i += sector {
		if bytes.Equal(image[i:i+sector], before[i:i+sector]) || !bytes.Equal(image[i:i+sector], at(flushed)[i:i+sector]) || allZero(before[i:i+sector]) {
			continue
		}
		damaged := bytes.Clone(image)
		copy(damaged[i:i+sector], before[i:])
		if err := judgeSurvivor(bytes.NewReader(damaged), h, flushed, issued); err == nil {
			t.Fatalf("a flushed sector, %d, is older than it was, and that is not seen", i/sector)
		}
		if seen++; seen > 20 {
			return
		}
	}
	t.Fatalf("only %d sectors were tried", seen)
}
