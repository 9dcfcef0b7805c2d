package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// lockPin makes the folder if need be and locks it; closing the file unlocks.
func lockPin(folder string) (*os.File, error) {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, fmt.Errorf("folder to pin fine tracking in: %w", err)
	}
	return lockPinned(folder)
}

// lockPinned is lockPin of a folder that is there.
func lockPinned(folder string) (*os.File, error) {
	f, err := os.Open(folder)
	if err != nil {
		return nil, fmt.Errorf("folder to pin fine tracking in: %w", err)
	}
	var st unix.Statfs_t
	if err = unix.Fstatfs(int(f.Fd()), &st); err == nil && int64(st.Type) != unix.BPF_FS_MAGIC {
		err = fmt.Errorf("it is not on a bpffs; mount one: mount -t bpf bpf /sys/fs/bpf")
	}
	if err == nil {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == unix.EWOULDBLOCK {
			err = fmt.Errorf("another process tracks with it: %w", err)
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("folder to pin fine tracking in: %s: %w", folder, err)
	}
	return f, nil
}

// EnsureMounted mounts a bpffs on a folder that has none, as machines without
// systemd leave it.
func EnsureMounted(folder string) error {
	var st unix.Statfs_t
	err := unix.Statfs(folder, &st)
	if err == nil && int64(st.Type) == unix.BPF_FS_MAGIC {
		return nil
	}
	if err == nil {
		err = unix.Mount("bpf", folder, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=700")
	}
	if err != nil {
		return fmt.Errorf("mount a bpffs on %s, to pin fine tracking in: %w", folder, err)
	}
	return nil
}

// UnpinOthers ends tracking that is pinned below root for a volume, by folders
// whose names begin with the volume's and '-', but for keep.
func UnpinOthers(root, volume, keep string) error {
	found, err := os.ReadDir(root)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range found {
		if strings.HasPrefix(e.Name(), volume+"-") && e.Name() != keep {
			errs = append(errs, os.RemoveAll(filepath.Join(root, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// pinName is what folders of volumes are called: two UUIDs, or their digits.
var pinName = regexp.MustCompile(`^[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}-[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}$`)

// UnpinStale ends tracking that is pinned below root for volumes of an owner that
// it does not have any more: wanted says which it has. What is of another owner, of
// none, or in use, is left. It returns the names of the volumes whose tracking it ended.
func UnpinStale(root, owner string, wanted func(volume string) bool) (ended []string, err error) {
	found, err := os.ReadDir(root)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, e := range found {
		if !pinName.MatchString(e.Name()) {
			continue
		}
		volume, err := unpinIfStale(filepath.Join(root, e.Name()), owner, wanted)
		if volume != "" {
			ended = append(ended, volume)
		}
		errs = append(errs, err)
	}
	return ended, errors.Join(errs...)
}

// unpinIfStale returns the volume's name if it ended the tracking.
func unpinIfStale(folder, owner string, wanted func(volume string) bool) (volume string, err error) {
	lock, err := lockPinned(folder)
	if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer lock.Close()
	m, err := ebpf.LoadPinnedMap(filepath.Join(folder, nameHeader), nil)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil // nobody's, or never finished
	}
	if err != nil {
		return "", fmt.Errorf("whose tracking is pinned in %s: %w", folder, err)
	}
	defer m.Close()
	if m.Type() != ebpf.Array || m.Flags()&unix.BPF_F_MMAPABLE == 0 || m.ValueSize() != headerWords*8 {
		return "", nil // not as this program makes it
	}
	words, err := mapWords(m.FD(), headerWords)
	if err != nil {
		return "", fmt.Errorf("whose tracking is pinned in %s: %w", folder, err)
	}
	defer func() { err = errors.Join(err, unmapWords(words)) }()
	head := header(words)
	name := head.text(headVolume, volumeBytes)
	if owner == "" || name == "" || head.get(headMagic) != headerMagic || head.owner() != ownerWords(owner) || wanted(name) {
		return "", nil
	}
	if err := errors.Join(unpin(folder), os.Remove(folder)); err != nil {
		return "", fmt.Errorf("end the tracking of volume %s, which is not configured any more: %w", name, err)
	}
	return name, nil
}
