package udev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
)

// A disk is named by its whole path, or by what it is, wherever it is attached:
//
//	serial:vol0123456789abcdef0       a disk's serial number; an EBS volume's is its id, with or without the dash
//	model:Amazon EC2 NVMe Instance Storage
//	serial:vol0123456789abcdef0-part2 a partition of it
//
// Serial number and model are what sysfs shows, without spaces around it, to the letter.
const (
	serialName = "serial:"
	modelName  = "model:"

	maxName = 200
	// ebsPrefix begins the id of an EBS volume; its serial number lacks the dash.
	ebsPrefix = "vol-"
)

// ErrAmbiguous says that more than one disk is of that name.
var ErrAmbiguous = errors.New("more than one disk is meant")

// IsName reports whether a word names a disk by what it is, and not by its path.
func IsName(word string) bool {
	return strings.HasPrefix(word, serialName) || strings.HasPrefix(word, modelName)
}

// IsModel reports whether a word names a disk by its model, which another may have, too.
func IsModel(word string) bool { return strings.HasPrefix(word, modelName) }

// CheckName refuses what is no whole path and names no disk by what it is.
func CheckName(word string) error {
	if !IsName(word) {
		if strings.HasPrefix(word, "/") {
			return nil
		}
		return fmt.Errorf("'%s' is not a whole path, such as /dev/disk/by-id/NAME, nor what a disk is, as serial:NUMBER or model:NAME", word)
	}
	_, value, _ := strings.Cut(word, ":")
	switch {
	case strings.TrimSpace(value) == "" || strings.TrimSpace(value) != value:
		return fmt.Errorf("'%s' names no disk: want serial:NUMBER or model:NAME, without spaces around it", word)
	case len(word) > maxName:
		return fmt.Errorf("a disk's name has %d bytes, at most %d are allowed", len(word), maxName)
	case strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return fmt.Errorf("'%s' holds what no disk's name holds", word)
	}
	return nil
}

// Path is the node of the disk that is called name: a path is its own. A name that found a
// disk once stays with it while it is there, also if another of that model comes.
// fs.ErrNotExist: there is no such disk. ErrAmbiguous: there are several; the error lists them.
// It may be called by several goroutines.
func Path(name string) (string, error) {
	if !IsName(name) {
		return name, nil
	}
	id, err := host.find(name)
	return id.Path, err
}

// Look says what the disk, or the regular file, that is called name is now; of a file only Path
// and SizeBytes are known. fs.ErrNotExist: it is not there, or it is a drive without medium (a
// loop device without file). Of a path it is what blockdev.Glance says, so no disk is waited
// for; a name that has found no disk yet has every disk asked for its serial number. It may be called by several goroutines.
func Look(name string) (blockdev.Identity, error) {
	var id blockdev.Identity
	path, err := Path(name)
	if err != nil {
		return id, err
	}
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return id, err
	case info.Mode().IsRegular():
		return blockdev.Identity{Path: path, SizeBytes: info.Size()}, nil
	}
	if id, err = blockdev.Glance(path); err == nil && id.SizeBytes == 0 {
		err = fmt.Errorf("%s has no medium: %w", path, fs.ErrNotExist)
	}
	return id, err
}

// There reports whether a disk that Look has seen is still there, whatever its name leads to
// by now. It is if the kernel can't say: only one that it does not have any more, has without
// medium, or has exchanged, is gone. A regular file always is there. Where the kernel numbers
// disks no disk is waited for.
func There(seen blockdev.Identity) bool { return host.there(seen) }

// Open opens the disk or file that is called name. One that was exchanged meanwhile is refused.
func Open(name string, o blockdev.OpenOptions) (*blockdev.File, error) {
	seen, err := Look(name)
	switch {
	case err != nil && (IsName(name) || errors.Is(err, fs.ErrNotExist)):
		return nil, fmt.Errorf("open device: %w", err)
	case err != nil: // whoever opens it says what it is
		return blockdev.OpenFile(name, o)
	}
	f, err := blockdev.OpenFile(seen.Path, o)
	if err != nil || seen.Major == 0 {
		return f, err
	}
	// An open device keeps its number to itself.
	now, err := blockdev.Glance(seen.Path)
	if err == nil && !Same(seen, now) {
		err = fmt.Errorf("open device: %s was replaced while it was being opened: try again", seen.Path)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Same reports whether two looks saw one disk, whatever size it had. Where the kernel numbers
// disks that tells it: a virtio disk that fails shows no serial number, and is still the same.
func Same(a, b blockdev.Identity) bool {
	switch {
	case a.Major == 0 && b.Major == 0:
		return a.Path == b.Path
	case a.Major != b.Major || a.Minor != b.Minor || a.Disk != b.Disk || a.Partition != b.Partition:
		return false
	case strings.HasPrefix(a.Disk, "dm-"):
		return a.WWID == b.WWID // its UUID; another table does not make it another disk
	case a.Sequence > 0 || b.Sequence > 0:
		return a.Sequence == b.Sequence
	}
	return a.Serial == b.Serial && a.WWID == b.WWID
}

// finder finds disks by name. Tests give it disks of their own.
type finder struct {
	disks func() ([]blockdev.Identity, error)
	at    func(major, minor uint32) (blockdev.Identity, error)

	mu    sync.Mutex
	found map[string]blockdev.Identity
}

var host = &finder{disks: blockdev.Disks, at: blockdev.GlanceNumber, found: map[string]blockdev.Identity{}}

func (f *finder) there(seen blockdev.Identity) bool {
	there, err := f.still(seen)
	return there || err != nil && !gone(err)
}

// still is there, with the error for which it can't be told.
func (f *finder) still(seen blockdev.Identity) (bool, error) {
	if seen.Major == 0 && seen.Minor == 0 {
		return true, nil
	}
	now, err := f.at(seen.Major, seen.Minor)
	return err == nil && now.SizeBytes > 0 && Same(seen, now), err
}

// gone says whether an error about a device in sysfs is that it is not there.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO)
}

func (f *finder) find(name string) (blockdev.Identity, error) {
	if err := CheckName(name); err != nil {
		return blockdev.Identity{}, err
	}
	f.mu.Lock()
	seen := f.found[name]
	f.mu.Unlock()
	if seen.Sequence > 0 { // without a sequence a twin can't be told
		if there, _ := f.still(seen); there {
			return seen, nil
		}
	}
	all, err := f.disks() // without mu: a disk that hangs keeps who asks for its serial number
	if err != nil {
		return blockdev.Identity{}, err
	}
	var fit []blockdev.Identity
	for _, id := range all {
		if called(name, id) {
			fit = append(fit, id)
		}
	}
	switch len(fit) {
	case 0:
		return blockdev.Identity{}, fmt.Errorf("no disk is '%s'; there are: %s: %w", name, list(all), fs.ErrNotExist)
	case 1:
		f.mu.Lock()
		f.found[name] = fit[0]
		f.mu.Unlock()
		return fit[0], nil
	}
	return blockdev.Identity{}, fmt.Errorf("%w by '%s': %s; name one by its serial number, or by its path below /dev/disk", ErrAmbiguous, name, list(fit))
}

// called says whether a disk is of that name.
func called(name string, id blockdev.Identity) bool {
	kind, value, _ := strings.Cut(name, ":")
	fits := func(value string) bool {
		if value == "" {
			return false
		}
		if kind+":" == modelName {
			return id.Model == value
		}
		if rest, ebs := strings.CutPrefix(value, ebsPrefix); ebs && id.Serial == strings.TrimSuffix(ebsPrefix, "-")+rest {
			return true
		}
		return id.Serial == value
	}
	if id.Partition == 0 {
		return fits(value)
	}
	whole, partition, found := lastCut(value, "-part")
	return found && partition == strconv.Itoa(id.Partition) && fits(whole)
}

func lastCut(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

// listed is how many disks a message names.
const listed = 12

// list names disks that can be told from others, for messages.
func list(all []blockdev.Identity) string {
	var words []string
	for _, id := range all {
		if id.Serial == "" && id.Model == "" {
			continue
		}
		word := id.Path + " ("
		if id.Serial != "" {
			word += "serial:" + id.Serial + ", "
		}
		if id.Model != "" {
			word += "model:" + id.Model + ", "
		}
		words = append(words, fmt.Sprintf("%s%d bytes)", word, id.SizeBytes))
	}
	if len(words) == 0 {
		return "none with a serial number or a model"
	}
	if more := len(words) - listed; more > 0 {
		words = append(slices.Clip(words[:listed]), fmt.Sprintf("and %d more", more))
	}
	return strings.Join(words, ", ")
}
