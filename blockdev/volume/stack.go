package volume

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/blockdev/dm"
)

const (
	roleData = "data"
	roleMeta = "meta"
	roleCow  = "cow"
	roleBase = "base"
	roleEra  = "era"
	roleTop  = "top"
	roleSnap = "snap"

	uuidPrefix = "BLOCKFERRY-"

	// adoptPatience is how long Up lets writes wait while it takes a left
	// snapshot off; there is no later occasion.
	adoptPatience = 30 * time.Second
)

// ErrFenced says that everything on a volume that is up fails: its lease ended, and
// another node may write it since.
var ErrFenced = errors.New("the volume's lease has ended and everything on it fails")

// stackRoles are the devices of a stack that is at rest, inner to outer.
var stackRoles = []string{roleData, roleMeta, roleCow, roleBase, roleEra, roleTop}

// deviceName is the device-mapper name of a volume's device.
func deviceName(volume, role string) string {
	if role == roleTop {
		return volume
	}
	return volume + "-" + role
}

// deviceUUID is the device-mapper uuid of a volume's device, by which udev
// rules know it.
func deviceUUID(volume UUID, role string) string { return uuidPrefix + volume.String() + "-" + role }

// IsVolume says of a device-mapper uuid whether it is that of a device that
// applications open, of any volume.
func IsVolume(uuid string) bool {
	return strings.HasPrefix(uuid, uuidPrefix) && strings.HasSuffix(uuid, "-"+roleTop)
}

// Up puts the volume up: it builds what is not there and adopts what an
// earlier process left, in whatever state. It refuses a device in use (and
// says by whom), one with another volume's label, and inner devices that are
// not what it would build; then nothing is changed but that devices of this
// volume which were left suspended are resumed.
func Up(ctl *dm.Control, o Options) (*Volume, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	v := &Volume{ctl: ctl, options: o, log: o.Log.With("volume", o.Name), devices: map[string]dm.Info{}}
	if err := v.up(); err != nil {
		return nil, errors.Join(fmt.Errorf("volume %s: up: %w", o.Name, err), v.closeFiles())
	}
	return v, nil
}

func (v *Volume) up() error {
	release, err := kernelRelease()
	if err == nil {
		err = CheckKernel(release, v.options.AllowOldKernel)
	}
	if err != nil {
		return err
	}
	if v.lock, err = blockdev.Lock(v.options.Device); err != nil {
		return err
	}
	// Applications may be waiting behind a suspended device: first of all.
	if err := Rescue(v.ctl, v.options.Name); err != nil {
		return err
	}
	if err := v.openDisk(); err != nil {
		return err
	}
	if err := v.openAreas(); err != nil {
		return err
	}
	if err := v.look(); err != nil {
		return err
	}
	if err := keepLabel(v.disk, &v.label); err != nil {
		return err
	}
	if err := v.checkTracking(); err != nil {
		return err
	}
	for _, role := range stackRoles {
		if err := v.ensure(role); err != nil {
			return err
		}
	}
	if err := v.clearLeftovers(); err != nil {
		return err
	}
	return v.openStack()
}

// openDisk opens the disk and checks that its label is the expected one.
func (v *Volume) openDisk() error {
	o := v.options
	disk, err := v.openRaw(o.Device)
	if err != nil {
		return err
	}
	v.disk = disk
	label, err := ReadLabel(disk)
	if errors.Is(err, ErrNoLabel) {
		_, why := Inspect(disk)
		return fmt.Errorf("%w; %s", err, why)
	}
	if err != nil {
		return err
	}
	v.label = *label
	if label.Damage != "" {
		v.log.Warn("one slot of the label is damaged; the other counts", "damage", label.Damage)
	}
	switch identity := identityOf(disk); {
	case !o.UUID.IsZero() && o.UUID != label.UUID:
		return fmt.Errorf("%w: %s holds volume %s, want %s", ErrOtherVolume, o.Device, label.UUID, o.UUID)
	case label.endBytes() > disk.Size():
		return fmt.Errorf("%w: the label of %s describes a disk of %d bytes, this one has %d", ErrOtherVolume, o.Device, label.endBytes(), disk.Size())
	case identity != "" && label.Identity != "" && identity != label.Identity:
		if !o.AllowOtherDisk {
			return fmt.Errorf("%w: the label of %s was written on disk '%s', this is '%s': a copy? Allow the other disk if it is to be used from now on",
				ErrOtherVolume, o.Device, label.Identity, identity)
		}
		v.lost = "the label was written on another disk, " + label.Identity
	}
	return nil
}

// openRaw opens a device below the stack. If the stack does not use it yet,
// nobody else may.
func (v *Volume) openRaw(path string) (*blockdev.File, error) {
	number, err := dm.DeviceNumber(path)
	if err != nil {
		return nil, err
	}
	ours, err := v.usesRaw(number)
	if err != nil {
		return nil, err
	}
	if !ours {
		f, err := blockdev.OpenFile(path, blockdev.OpenOptions{Exclusive: true})
		if err != nil {
			return nil, err
		}
		f.Close() // device-mapper claims it next
	}
	return blockdev.OpenFile(path, blockdev.OpenOptions{Write: true})
}

// usesRaw says whether a device of this volume's name stands on the device.
func (v *Volume) usesRaw(number string) (bool, error) {
	for _, role := range []string{roleData, roleMeta, roleCow} {
		name := deviceName(v.options.Name, role)
		info, err := v.ctl.Info(name)
		if err != nil || !info.HasActive {
			if err != nil {
				return false, err
			}
			continue
		}
		table, err := v.ctl.Table(name)
		if err != nil {
			return false, err
		}
		if len(table) == 1 && table[0].Type == "linear" && strings.HasPrefix(table[0].Params, number+" ") {
			return true, nil
		}
	}
	return false, nil
}

// openAreas opens the devices of the COW and metadata areas.
func (v *Volume) openAreas() error {
	o, l := v.options, &v.label
	for _, a := range []struct {
		option    string
		path      string
		elsewhere bool
		area      Area
		into      **blockdev.File
	}{
		{"COW", o.CowDevice, l.CowElsewhere, l.Areas.Cow, &v.cow},
		{"metadata", o.MetaDevice, l.MetaElsewhere, l.Areas.Meta, &v.meta},
	} {
		switch {
		case a.elsewhere != (a.path != ""):
			where := map[bool]string{true: "on a device of its own", false: "on the disk itself"}
			return fmt.Errorf("the label of %s says that the %s area is %s; the options say %s", o.Device, a.option, where[a.elsewhere], where[a.path != ""])
		case !a.elsewhere:
			*a.into = v.disk
		default:
			f, err := v.openRaw(a.path)
			if err != nil {
				return err
			}
			*a.into = f
			if f.Size() < a.area.End() {
				return fmt.Errorf("%w: %s device %s has %d bytes, the label says %d", ErrOtherVolume, a.option, a.path, f.Size(), a.area.End())
			}
		}
	}
	id, err := readAux(v.cow, l.Areas.Cow.Offset)
	switch {
	case err != nil && !errors.Is(err, errNoAux):
		return err
	case err == nil && id.volume == l.UUID && id.kind == kindCow:
		return nil
	case err == nil && id.volume == l.UUID && !l.CowElsewhere:
		// The area came to lie here when the volume grew.
	case err == nil:
		return fmt.Errorf("%w: the COW area of %s belongs to volume %s", ErrOtherVolume, v.cow.Name(), id.volume)
	case l.CowElsewhere:
		if content, why := Inspect(v.cow); content != Blank {
			return fmt.Errorf("%w: the COW device is not this volume's and not blank: %s", ErrOtherVolume, why)
		}
	}
	if err := writeAux(v.cow, l.Areas.Cow.Offset, auxID{kind: kindCow, volume: l.UUID}); err != nil {
		return err
	}
	return v.cow.Flush()
}

// look finds what is there and checks that all of it is what ensure would
// build, before anything is changed.
func (v *Volume) look() error {
	for _, role := range append(slices.Clone(stackRoles), roleSnap) {
		name := deviceName(v.options.Name, role)
		info, err := v.ctl.Info(name)
		if err != nil {
			return err
		}
		if !info.Exists {
			continue
		}
		if want := deviceUUID(v.label.UUID, role); info.UUID != want {
			return fmt.Errorf("%w: the device-mapper device %s has uuid '%s', want '%s'", ErrOtherVolume, name, info.UUID, want)
		}
		v.devices[role] = info
	}
	for _, role := range stackRoles {
		info := v.devices[role]
		if !info.HasActive {
			continue
		}
		got, err := v.ctl.Table(info.Name)
		if err != nil {
			return err
		}
		want, err := v.table(role)
		if err != nil {
			return err
		}
		if len(got) == 1 && (got[0] == want || role == roleBase && got[0] == v.originTable()) {
			continue
		}
		if role == roleTop && dm.Failing(got) {
			return fmt.Errorf("%w: take it down, then up", ErrFenced)
		}
		return fmt.Errorf("%w: %s has the table '%v', want '%s': take the volume down, then up", ErrOtherVolume, info.Name, got, want)
	}
	return nil
}

// table is what a device of the stack is made of.
func (v *Volume) table(role string) (dm.Target, error) {
	l := &v.label
	size := uint64(l.Areas.Data.Length / blockdev.SectorSize)
	on := func(f *blockdev.File, a Area, skip int64) (dm.Target, error) {
		number, err := dm.DeviceNumber(f.Name())
		return linear(number, a.Offset+skip, a.Length-skip), err
	}
	switch role {
	case roleData:
		return on(v.disk, l.Areas.Data, 0)
	case roleMeta:
		return on(v.meta, l.Areas.Meta, auxIDBytes)
	case roleCow:
		return on(v.cow, l.Areas.Cow, auxIDBytes)
	case roleBase:
		return linear(v.devices[roleData].Dev(), 0, l.Areas.Data.Length), nil
	case roleEra:
		return dm.Target{Length: size, Type: "era", Params: fmt.Sprintf("%s %s %d",
			v.devices[roleMeta].Dev(), v.devices[roleBase].Dev(), l.EraBlockBytes/blockdev.SectorSize)}, nil
	}
	return linear(v.devices[roleEra].Dev(), 0, l.Areas.Data.Length), nil
}

func (v *Volume) originTable() dm.Target {
	return dm.Target{Length: uint64(v.label.Areas.Data.Length / blockdev.SectorSize), Type: "snapshot-origin", Params: v.devices[roleData].Dev()}
}

func linear(device string, offset, length int64) dm.Target {
	return dm.Target{Length: uint64(length / blockdev.SectorSize), Type: "linear", Params: fmt.Sprintf("%s %d", device, offset/blockdev.SectorSize)}
}

// ensure makes a device of the stack if it is not there, and gives it its
// table if it has none.
func (v *Volume) ensure(role string) error {
	name := deviceName(v.options.Name, role)
	info := v.devices[role]
	if !info.Exists {
		made, err := v.ctl.Create(name, deviceUUID(v.label.UUID, role))
		if err != nil {
			return err
		}
		info = made
		v.devices[role] = info
	}
	if !info.HasActive {
		table, err := v.table(role)
		if err != nil {
			return err
		}
		if err := v.ctl.Load(name, []dm.Target{table}); err != nil {
			return err
		}
	}
	if role == roleTop && v.options.Hold != nil {
		if err := v.options.Hold(); err != nil {
			return err
		}
	}
	if !info.HasActive {
		if err := v.ctl.Resume(name); err != nil {
			return err
		}
	}
	info, err := v.ctl.Info(name)
	if err != nil {
		return err
	}
	v.devices[role] = info
	if role == roleEra && !v.label.MetaFormatted {
		// Durable before the top exists, and with it the first mark.
		if err := v.changeLabel(func(l *Label) { l.MetaFormatted = true }); err != nil {
			return err
		}
	}
	if role == roleEra {
		if err := v.decideDiscards(); err != nil {
			return err
		}
	}
	if role == roleEra || role == roleTop {
		return v.limitDiscards(info)
	}
	return nil
}

// clearLeftovers removes what a cut that was never released left behind.
func (v *Volume) clearLeftovers() error {
	if err := v.dropMetadataSnapshot(); err != nil {
		return err
	}
	if err := v.baseToLinear(adoptPatience); err != nil {
		return err
	}
	return v.removeSnapshot()
}

func (v *Volume) openStack() error {
	open := func(role string) (*blockdev.File, error) {
		path, err := v.ctl.OwnNode(deviceName(v.options.Name, role))
		if err != nil {
			return nil, err
		}
		return blockdev.OpenFile(path, blockdev.OpenOptions{})
	}
	var err error
	if v.data, err = open(roleData); err != nil {
		return err
	}
	if v.eras, err = open(roleMeta); err != nil {
		return err
	}
	if err := keepStatistics(v.devices[roleTop]); err != nil {
		v.log.Warn("statistics are on again", "error", err) // and no cut was taken by them yet
	}
	if v.stat, err = os.Open(fmt.Sprintf("/sys/dev/block/%s/stat", v.devices[roleTop].Dev())); err != nil {
		return err
	}
	if _, err = v.ctl.EnsureNode(v.options.Name); err != nil {
		return err
	}
	v.limits, err = v.watchLimits()
	if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) {
		v.log.Warn("limits of discards that somebody raises and puts back between two cuts are not noticed", "error", err,
			"advice", "raise the sysctl fs.inotify.max_user_instances; it is tried again when the agent starts")
	} else if err != nil {
		return err
	}
	v.openFine()
	return v.openPreCopy()
}

// Rescue resumes what a dead process left suspended of a volume, inner to
// outer, and does nothing else. While an agent runs it voids the cut that agent
// is taking.
func Rescue(ctl *dm.Control, name string) error {
	for _, role := range stackRoles {
		device := deviceName(name, role)
		info, err := ctl.Info(device)
		if err != nil {
			return err
		}
		if !info.Exists || !strings.HasPrefix(info.UUID, uuidPrefix) || !info.HasActive {
			continue
		}
		failing := false
		if info.HasInactive && role == roleTop {
			// A dead-man may be about to make it fail: its lease has ended.
			table, err := ctl.InactiveTable(device)
			if err != nil {
				return err
			}
			failing = dm.Failing(table)
		}
		// A resume would take a waiting table into use. One for era was read
		// while the other went on committing: marks would be lost.
		if info.HasInactive && !failing {
			if err := ctl.Clear(device); err != nil {
				return err
			}
		}
		if info.Suspended || failing {
			if err := retryEINTR(func() error { return ctl.Resume(device) }); err != nil {
				return err
			}
		}
	}
	return nil
}

// retryEINTR tries again what a signal interrupted.
func retryEINTR(f func() error) error {
	var err error
	for range 10 {
		if err = f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return err
}
