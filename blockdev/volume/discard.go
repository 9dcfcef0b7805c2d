package volume

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/blockdev/dm"
)

// dm-era marks only the block in which a discard begins, and device-mapper does
// not split discards at the borders of its blocks. So the kernel is told, by the
// queue limits of the top and of era, to split them into pieces of at most one
// era block. A piece then touches the block that it marks and at most the one
// behind it: on a volume that ever took discards each marked block names the one
// behind it, too (Label.Discards).
//
// A frozen view is not torn by them: snapshot-origin takes none. While a view is
// held the kernel ends a discard with 'not supported' below era, which file
// systems take for a hint that was not followed. The limits stay as they are
// meanwhile: what is stacked on the volume copies them only once.

const (
	discardMax         = "discard_max_bytes"
	discardMaxHardware = "discard_max_hw_bytes"
	discardGrain       = "discard_granularity"
)

// DiscardsOff says why a volume on a disk, with era blocks of that size, does
// not take discards; "": it does.
func DiscardsOff(device string, eraBlockBytes int64) string {
	number, err := dm.DeviceNumber(device)
	if err != nil {
		return err.Error()
	}
	queue := queueOf(number)
	if _, err := os.Stat(queue); err != nil {
		queue = filepath.Join(queue, "../../queue") // of a partition's disk
	}
	return discardsOff(device, queue, discardMax, eraBlockBytes)
}

// discardsOff says why a queue can't be limited to discards of at most one era
// block; "": it can. most is the limit that can't be exceeded.
func discardsOff(name, queue, most string, block int64) string {
	limit, err := blockdev.ReadNumber(filepath.Join(queue, most))
	if err != nil {
		return err.Error()
	}
	grain, err := blockdev.ReadNumber(filepath.Join(queue, discardGrain))
	switch {
	case err != nil:
		return err.Error()
	case limit == 0 || grain == 0:
		return name + " takes none"
	case block%grain != 0:
		// The kernel would not split them, or not where it was told.
		return fmt.Sprintf("%s takes them in pieces of %d bytes, and an era block (%d bytes) is no multiple of that", name, grain, block)
	case limit < grain:
		return fmt.Sprintf("%s takes them in pieces of %d bytes, but at most %d", name, grain, limit)
	}
	return ""
}

// decideDiscards decides, once era is there and before the top is, whether the
// volume takes discards. The label says so before the first can come.
func (v *Volume) decideDiscards() error {
	if v.devices[roleTop].HasActive {
		if _, err := v.keepDiscardLimits(); err != nil {
			return err
		}
	}
	for _, role := range []string{roleEra, roleTop} {
		if info := v.devices[role]; info.HasActive && v.noDiscards == "" {
			v.noDiscards = discardsOff(info.Name, queueDir(info), discardMaxHardware, v.label.EraBlockBytes)
		}
	}
	if v.noDiscards != "" {
		v.log.Info("discards stay off", "reason", v.noDiscards)
		return nil
	}
	// In both slots: either may be the one that is left. Each time, as a process that
	// was killed may have left it in one, below a volume that is up.
	for range 2 {
		if err := v.changeLabel(func(l *Label) { l.Discards = true }); err != nil {
			return err
		}
	}
	return nil
}

// limitDiscards sets how long a discard of era or the top may be. A table load
// undoes it. If that can't be done the volume takes none.
func (v *Volume) limitDiscards(info dm.Info) error {
	if v.noDiscards == "" {
		err := limitDiscards(info, v.labelNow().EraBlockBytes)
		if err == nil {
			return nil
		}
		v.noDiscards = err.Error()
		v.log.Warn("discards stay off", "reason", v.noDiscards)
	}
	return limitDiscards(info, 0)
}

func limitDiscards(info dm.Info, most int64) error {
	fail := func(err error) error { return fmt.Errorf("limit the discards of %s: %w", info.Name, err) }
	queue := queueDir(info)
	if err := os.WriteFile(filepath.Join(queue, discardMax), []byte(strconv.FormatInt(most, 10)), 0); err != nil {
		return fail(err)
	}
	now, err := blockdev.ReadNumber(filepath.Join(queue, discardMax))
	if err != nil {
		return fail(err)
	}
	// Below its grain the kernel does not split at all.
	grain, err := blockdev.ReadNumber(filepath.Join(queue, discardGrain))
	if err != nil {
		return fail(err)
	}
	if now > most || now < min(most, grain) {
		return fail(fmt.Errorf("%s is %d, want %d, or less in pieces of %d", filepath.Join(queue, discardMax), now, most, grain))
	}
	return nil
}

// limitWatch notices writes to the limits of discards, by inotify: who raises one and
// puts it back between two cuts leaves no other trace.
type limitWatch struct {
	fd    int
	roles map[uint32]string // by watch
}

func (v *Volume) watchLimits() (*limitWatch, error) {
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("watch the limits of discards: %w", err)
	}
	w := &limitWatch{fd, map[uint32]string{}}
	for _, role := range []string{roleEra, roleTop} {
		path := filepath.Join(queueDir(v.devices[role]), discardMax)
		id, err := unix.InotifyAddWatch(fd, path, unix.IN_MODIFY)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("watch %s: %w", path, err), w.close())
		}
		w.roles[uint32(id)] = role
	}
	return w, nil
}

func (w *limitWatch) close() error { return unix.Close(w.fd) }

// written says which limits were written to since it was asked last.
func (w *limitWatch) written() (map[string]bool, error) {
	roles := map[string]bool{}
	buffer := make([]byte, 64*unix.SizeofInotifyEvent)
	for {
		n, err := unix.Read(w.fd, buffer)
		if errors.Is(err, unix.EAGAIN) {
			return roles, nil
		}
		if err != nil {
			return nil, fmt.Errorf("watch the limits of discards: %w", err)
		}
		for b := buffer[:n]; len(b) >= unix.SizeofInotifyEvent; b = b[unix.SizeofInotifyEvent:] {
			// struct inotify_event: watch, mask, cookie, length of a name, which files have none of.
			if role, known := w.roles[binary.NativeEndian.Uint32(b)]; known {
				roles[role] = true
			} else { // too many to keep
				roles[roleEra], roles[roleTop] = true, true
			}
		}
	}
}

// keepDiscardLimits sets limits again that somebody else raised. Either is
// enough; while neither held, as it may have been where both were written to,
// discards may have gone unmarked (lost), so that no question about an earlier cut
// has an answer.
func (v *Volume) keepDiscardLimits() (lost bool, err error) {
	label, most := v.labelNow(), int64(0)
	if label.Discards && v.noDiscards == "" {
		most = label.EraBlockBytes
	}
	written := map[string]bool{}
	if v.limits != nil {
		if written, err = v.limits.written(); err != nil {
			return false, err
		}
	}
	raised, again := 0, false
	for _, role := range []string{roleEra, roleTop} {
		info := v.devices[role]
		now, err := blockdev.ReadNumber(filepath.Join(queueDir(info), discardMax))
		if err != nil {
			return false, fmt.Errorf("the limit of discards of %s: %w", info.Name, err)
		}
		if now <= most {
			if written[role] {
				v.log.Warn("somebody wrote to the limit of discards; it may have been raised for a time", "device", info.Name)
				raised++
			}
			continue
		}
		raised, again = raised+1, true
		v.log.Warn("somebody raised the limit of discards; it is set again", "device", info.Name, "bytes", now, "want", most)
		if err := limitDiscards(info, most); err != nil {
			return false, err
		}
	}
	if again && v.limits != nil {
		if _, err := v.limits.written(); err != nil { // that was this
			return false, err
		}
	}
	if raised < 2 {
		return false, nil
	}
	v.log.Warn("the era's marks begin anew: longer discards than it can mark were let through, of which some may be missing")
	return true, v.changeLabel(func(l *Label) { l.Cuts = nil })
}

// marked is what the era's marks say on a volume with this label: from marks,
// ascending and disjoint, the extents that may have changed, likewise. The last
// may reach beyond the volume.
func (l *Label) marked(marks []blockdev.Extent) []blockdev.Extent {
	if !l.Discards {
		return marks
	}
	var out []blockdev.Extent
	for _, e := range marks {
		e.Length += l.EraBlockBytes
		if n := len(out) - 1; n >= 0 && out[n].End() >= e.Offset {
			out[n].Length = e.End() - out[n].Offset
			continue
		}
		out = append(out, e)
	}
	return out
}

func queueDir(info dm.Info) string { return queueOf(info.Dev()) }

func queueOf(number string) string { return fmt.Sprintf("/sys/dev/block/%s/queue", number) }
