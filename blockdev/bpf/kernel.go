package bpf

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// object is program/tracker.c, compiled: 'make generate'.
//
//go:embed program/tracker.o
var object []byte

// objectDigest tells one version of the programs from another.
func objectDigest() uint64 {
	sum := sha256.Sum256(object)
	return binary.NativeEndian.Uint64(sum[:])
}

const (
	nameActive = "active"
	nameKept   = "kept"
	nameHeader = "header"
	nameCounts = "counts"
	linkSuffix = "-link"

	// flyingBios bounds what may be in flight on a disk without requests.
	flyingBios = 1 << 16
)

// programsOf names the programs that follow a disk: first the one that sees
// what ends, then those that see what begins.
func programsOf(requests bool) []string {
	if requests {
		return []string{"request_done", "request_begun", "request_back"}
	}
	return []string{"bio_done", "bio_queued"}
}

// kernel is what stands in the kernel for one volume.
type kernel struct {
	maps     map[string]*ebpf.Map
	memory   map[string][]uint64 // the maps' own
	programs []*ebpf.Program
	links    []link.Link // of the programs; nil: it was not started
}

func (k *kernel) close() error {
	var errs []error
	for _, words := range k.memory {
		errs = append(errs, unmapWords(words))
	}
	for _, l := range k.links {
		if l != nil {
			errs = append(errs, l.Close())
		}
	}
	for _, p := range k.programs {
		errs = append(errs, p.Close())
	}
	for _, m := range k.maps {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}

// mapAll maps the maps' memory, in whole pages.
func (k *kernel) mapAll(s shapeOfMaps) error {
	k.memory = map[string][]uint64{}
	for name, words := range s.words() {
		m, err := mapWords(k.maps[name].FD(), words)
		if err != nil {
			return fmt.Errorf("map %q of fine tracking: %w", name, err)
		}
		k.memory[name] = m
	}
	return nil
}

// misses is how often the kernel left out a program of each side.
func (k *kernel) misses() (n [sides]uint64, err error) {
	for i, p := range k.programs {
		s, err := p.Stats()
		if err != nil {
			return n, fmt.Errorf("statistics of a program of fine tracking: %w", err)
		}
		n[min(i, int(begun))] += s.RecursionMisses
	}
	return n, nil
}

// shapeOfMaps is how large they are.
type shapeOfMaps struct {
	grains int64
	cpus   int
}

func (s shapeOfMaps) words() map[string]int64 {
	return map[string]int64{
		nameActive: markMemory(s.grains), nameKept: markMemory(s.grains),
		nameHeader: headerWords, nameCounts: int64(s.cpus) * slotWords,
	}
}

// fits says whether a map that was pinned is as the shape wants it.
func (s shapeOfMaps) fits(name string, m *ebpf.Map) bool {
	return m.Type() == ebpf.Array && m.Flags()&unix.BPF_F_MMAPABLE != 0 &&
		int64(m.ValueSize())*int64(m.MaxEntries()) == s.words()[name]*8
}

// load makes maps and programs and starts the programs. Of a disk with requests
// only the one is started that sees what ends. Nothing is pinned.
func load(w where, s shapeOfMaps) (_ *kernel, err error) {
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(object))
	if err != nil {
		return nil, fmt.Errorf("programs of fine tracking: %w", err)
	}
	words := s.words()
	spec.Maps[nameActive].MaxEntries = uint32(words[nameActive])
	spec.Maps[nameCounts].MaxEntries = uint32(s.cpus)
	spec.Maps["flying"].MaxEntries = flyingBios
	own := func(value, entries uint32) *ebpf.MapSpec {
		return &ebpf.MapSpec{Type: ebpf.Array, Flags: unix.BPF_F_MMAPABLE, KeySize: 4, ValueSize: value, MaxEntries: entries}
	}
	spec.Maps[nameKept] = own(8, uint32(words[nameKept]))
	spec.Maps[nameHeader] = own(headerWords*8, 1)
	wanted := programsOf(w.place.Requests)
	for name := range spec.Programs {
		if !slices.Contains(wanted, name) {
			delete(spec.Programs, name)
		}
	}
	if w.place.Requests {
		delete(spec.Maps, "flying")
	}
	summary, _ := shape(s.grains)
	for name, value := range map[string]any{
		"disk_major": w.place.Major, "disk_minor": w.place.Minor,
		"first_sector": uint64(w.start) / sectorSize, "volume_sectors": uint64(w.target.Length) / sectorSize,
		"grain_shift": w.grainShift(), "summary_word": uint32(summary),
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, fmt.Errorf("programs of fine tracking: %s: %w", name, err)
		}
	}
	loaded, err := ebpf.NewCollection(spec)
	if err != nil {
		return nil, fmt.Errorf("the kernel refuses the programs of fine tracking (want Linux 5.17 or newer with BTF, and root): %w", err)
	}
	defer loaded.Close()
	k := &kernel{maps: map[string]*ebpf.Map{}}
	defer func() {
		if err != nil {
			k.close()
		}
	}()
	for name := range words {
		k.maps[name] = loaded.DetachMap(name)
	}
	for _, name := range wanted {
		k.programs = append(k.programs, loaded.DetachProgram(name))
	}
	if err := k.mapAll(s); err != nil {
		return nil, err
	}
	k.links = make([]link.Link, len(wanted))
	for i := range k.programs {
		if i > 0 && w.place.Requests {
			break
		}
		if err := k.start(i, wanted[i]); err != nil {
			return nil, err
		}
	}
	return k, nil
}

func (k *kernel) start(program int, name string) (err error) {
	k.links[program], err = link.AttachTracing(link.TracingOptions{Program: k.programs[program]})
	if err != nil {
		k.links[program] = nil
		return fmt.Errorf("start %s of fine tracking: %w", name, err)
	}
	return nil
}

// startAll starts and pins those programs that are not yet.
func (k *kernel) startAll(folder string, names []string) error {
	for i, name := range names {
		if k.links[i] != nil {
			continue
		}
		if err := k.start(i, name); err != nil {
			return err
		}
		if err := k.links[i].Pin(filepath.Join(folder, name+linkSuffix)); err != nil {
			return fmt.Errorf("pin %s of fine tracking in %s: %w", name, folder, err)
		}
	}
	return nil
}

// startedAll says whether all programs are started.
func (k *kernel) startedAll() bool { return !slices.Contains(k.links, nil) }

// startedAll says whether what is pinned in a folder had all programs started.
func startedAll(folder string, names []string) bool {
	for _, name := range names {
		if _, err := os.Lstat(filepath.Join(folder, name+linkSuffix)); err != nil {
			return false
		}
	}
	return true
}

// pin makes it outlive this process.
func (k *kernel) pin(folder string, names []string) error {
	var errs []error
	for name, m := range k.maps {
		errs = append(errs, m.Pin(filepath.Join(folder, name)))
	}
	for i, name := range names {
		errs = append(errs, k.programs[i].Pin(filepath.Join(folder, name)))
		if k.links[i] != nil {
			errs = append(errs, k.links[i].Pin(filepath.Join(folder, name+linkSuffix)))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("pin fine tracking in %s: %w", folder, err)
	}
	return nil
}

// errNothingPinned says that a folder is empty.
var errNothingPinned = errors.New("nothing is pinned")

// openPinned opens what pin left, if it is whole and belongs together.
func openPinned(folder string, requests bool, s shapeOfMaps) (_ *kernel, err error) {
	names := programsOf(requests)
	entries, err := os.ReadDir(folder)
	if err != nil {
		return nil, err
	}
	if len(entries) == 0 {
		return nil, errNothingPinned
	}
	k := &kernel{maps: map[string]*ebpf.Map{}}
	defer func() {
		if err != nil {
			k.close()
		}
	}()
	used := map[ebpf.MapID]bool{}
	for i, name := range names {
		p, err := ebpf.LoadPinnedProgram(filepath.Join(folder, name), nil)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		k.programs = append(k.programs, p)
		l, err := link.LoadPinnedLink(filepath.Join(folder, name+linkSuffix), nil)
		if i > 0 && requests && errors.Is(err, fs.ErrNotExist) {
			k.links = append(k.links, nil) // it was never needed
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name+linkSuffix, err)
		}
		k.links = append(k.links, l)
		info, err := p.Info()
		if err != nil {
			return nil, err
		}
		id, _ := info.ID()
		ids, _ := info.MapIDs()
		for _, m := range ids {
			used[m] = true
		}
		if started, err := k.links[i].Info(); err != nil {
			return nil, err
		} else if started.Program != id {
			return nil, fmt.Errorf("%s starts another program", name+linkSuffix)
		}
	}
	for name := range s.words() {
		m, err := ebpf.LoadPinnedMap(filepath.Join(folder, name), nil)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		k.maps[name] = m
		if !s.fits(name, m) {
			return nil, fmt.Errorf("%s has another size", name)
		}
		if name != nameActive && name != nameCounts {
			continue
		}
		info, err := m.Info()
		if err != nil {
			return nil, err
		}
		if id, _ := info.ID(); !used[id] {
			return nil, fmt.Errorf("%s is not what the programs write to", name)
		}
	}
	if err := k.mapAll(s); err != nil {
		return nil, err
	}
	return k, nil
}

// unpin removes all that stands in a folder, links first: what is pinned ends
// with its last descriptor.
func unpin(folder string) error {
	entries, err := os.ReadDir(folder)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, links := range []bool{true, false} {
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), linkSuffix) == links {
				errs = append(errs, os.Remove(filepath.Join(folder, e.Name())))
			}
		}
	}
	return errors.Join(errs...)
}
