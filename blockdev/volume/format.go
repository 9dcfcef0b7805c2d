package volume

import (
	"errors"
	"fmt"
	"time"

	"blockferry/blockdev"
)

// FormatOptions say what Format makes of a disk.
type FormatOptions struct {
	Device                string
	CowDevice, MetaDevice string // "": on the disk
	SizeBytes             int64  // 0: as large as fits
	EraBlockBytes         int64  // 0: DefaultEraBlockBytes
	CowBytes              int64  // 0: DefaultCowBytes
	TailBytes             int64
	UUID                  UUID // zero: a new one
	State                 []byte
	// Overwrite takes a device that is not blank. Its data area is not
	// touched, but everything else is.
	Overwrite bool
	// Check, if not nil, may refuse Device once that is held, before anything is written.
	Check func(disk *blockdev.File) error
	// Wait is how long a program that has one of the devices is waited for.
	Wait time.Duration
}

// Format writes a volume's label and identity blocks. It refuses, before it
// writes anything, a device in use and, unless Overwrite is set, one that is
// not positively blank. The data area is left as it is.
func Format(o FormatOptions) (*Label, error) {
	if o.EraBlockBytes == 0 {
		o.EraBlockBytes = DefaultEraBlockBytes
	}
	if o.UUID.IsZero() {
		o.UUID = NewUUID()
	}
	var opened []*blockdev.File
	defer func() {
		for _, f := range opened {
			f.Close()
		}
	}()
	open := func(path string) (*blockdev.File, error) {
		f, err := blockdev.OpenFile(path, blockdev.OpenOptions{Write: true, Exclusive: true, Wait: o.Wait})
		if err != nil {
			return nil, err
		}
		opened = append(opened, f)
		if content, why := Inspect(f); content != Blank && !o.Overwrite {
			return nil, fmt.Errorf("will not format %s: %s", path, why)
		}
		return f, nil
	}
	disk, err := open(o.Device)
	if err != nil {
		return nil, err
	}
	if o.Check != nil {
		if err := o.Check(disk); err != nil {
			return nil, err
		}
	}
	cow, meta := disk, disk
	layout := LayoutOptions{SizeBytes: o.SizeBytes, EraBlockBytes: o.EraBlockBytes, CowBytes: o.CowBytes, TailBytes: o.TailBytes}
	if o.CowDevice != "" {
		if cow, err = open(o.CowDevice); err != nil {
			return nil, err
		}
		layout.CowDeviceBytes = cow.Size()
	}
	if o.MetaDevice != "" {
		if meta, err = open(o.MetaDevice); err != nil {
			return nil, err
		}
		layout.MetaDeviceBytes = meta.Size()
	}
	areas, err := Layout(disk.Size(), layout)
	if err != nil {
		return nil, fmt.Errorf("format %s: %w", o.Device, err)
	}
	l := &Label{
		UUID: o.UUID, EraID: NewUUID(), Identity: identityOf(disk), EraBlockBytes: o.EraBlockBytes,
		Areas: areas, CowElsewhere: cow != disk, MetaElsewhere: meta != disk, State: o.State,
	}
	return l, l.format(disk, cow, meta)
}

// format writes a new label and the identities of its areas.
func (l *Label) format(disk, cow, meta blockdev.Device) error {
	if _, err := l.encode(); err != nil {
		return err
	}
	// The label comes last: without it nothing of this counts.
	if err := disk.ZeroOut(0, dataOffset); err != nil {
		return err
	}
	// An older label must not vouch for areas that are being replaced.
	if err := disk.Flush(); err != nil {
		return err
	}
	if err := writeAux(cow, l.Areas.Cow.Offset, auxID{kind: kindCow, volume: l.UUID}); err != nil {
		return err
	}
	if err := freshMetadata(meta, l); err != nil {
		return err
	}
	if err := errors.Join(cow.Flush(), disk.Flush()); err != nil {
		return err
	}
	return writeLabel(disk, l)
}

// freshMetadata empties the era metadata, which the kernel then formats, and
// gives it the label's era id. Durable on return.
func freshMetadata(meta blockdev.Device, l *Label) error {
	at := l.Areas.Meta.Offset
	if err := meta.ZeroOut(at, 2*blockdev.BlockSize); err != nil {
		return err
	}
	// No identity before the old content is surely gone.
	if err := meta.Flush(); err != nil {
		return fmt.Errorf("%s: %w", meta.Name(), err)
	}
	return writeMetaID(meta, l)
}

func writeMetaID(meta blockdev.Device, l *Label) error {
	if err := writeAux(meta, l.Areas.Meta.Offset, auxID{kind: kindMeta, volume: l.UUID, era: l.EraID}); err != nil {
		return err
	}
	if err := meta.Flush(); err != nil {
		return fmt.Errorf("%s: %w", meta.Name(), err)
	}
	return nil
}

// identityOf is what tells a disk from any other, "" when nothing does.
func identityOf(f *blockdev.File) string {
	id, err := blockdev.Identify(f.Name())
	if err != nil {
		return "" // a regular file, or no sysfs
	}
	s := ""
	switch {
	case id.Serial != "":
		s = "serial " + id.Serial
	case id.WWID != "":
		s = "wwid " + id.WWID
	default:
		return ""
	}
	if id.Partition != 0 {
		s += fmt.Sprintf(" partition %d", id.Partition)
	}
	return s[:min(len(s), maxIdentity)]
}
