package integration

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"

	"blockferry/blockdev"
	"blockferry/blockdev/era"
)

// eraDevice is a dm-era in a guest, and what was written to it.
type eraDevice struct {
	t               *testing.T
	metadata        string
	blockSize, size int64
	rng             *rand.Rand
	writtenInEra    map[uint32][]blockdev.Extent // in bytes, as they were written
}

// newEraDevice puts a fresh dm-era with blocks of blockSize bytes over a
// device of size bytes that swallows writes.
func newEraDevice(t *testing.T, metadata string, size, blockSize int64, seed uint64) *eraDevice {
	t.Helper()
	d := &eraDevice{t: t, metadata: metadata, blockSize: blockSize, size: size,
		rng: rand.New(rand.NewPCG(seed, 1)), writtenInEra: map[uint32][]blockdev.Extent{}}
	m := openDevice(t, metadata)
	if _, err := m.WriteAt(blockdev.AlignedBuffer(4096), 0); err != nil { // asks era to format it
		t.Fatal(err)
	}
	zero := dmCreate(t, "swallow", fmt.Sprintf("0 %d zero", size/512))
	dmCreate(t, "era", fmt.Sprintf("0 %d era %s %s %d", size/512, metadata, zero, blockSize/512))
	return d
}

func openDevice(t *testing.T, path string) *blockdev.File {
	t.Helper()
	f, err := blockdev.OpenFile(path, blockdev.OpenOptions{Write: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// status reads the current era and the metadata snapshot's block.
func (d *eraDevice) status() (current uint32, snapshot uint64) {
	d.t.Helper()
	fields := strings.Fields(run(d.t, "dmsetup", "status", "era"))
	if len(fields) != 7 {
		d.t.Fatalf("status of era: %q", fields)
	}
	n, err := strconv.ParseUint(fields[5], 10, 32)
	if err != nil {
		d.t.Fatal(err)
	}
	if fields[6] != "-" {
		if snapshot, err = strconv.ParseUint(fields[6], 10, 64); err != nil {
			d.t.Fatal(err)
		}
	}
	return uint32(n), snapshot
}

// write makes n writes of 4 KiB to 400 KiB in the current era, some of them
// over the border of blocks, some at the end of the device.
func (d *eraDevice) write(n int) {
	d.t.Helper()
	current, _ := d.status()
	f, err := blockdev.OpenFile("/dev/mapper/era", blockdev.OpenOptions{Write: true})
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	for range n {
		e := d.place()
		if _, err := f.WriteAt(blockdev.AlignedBuffer(int(e.Length)), e.Offset); err != nil {
			d.t.Fatal(err)
		}
		d.writtenInEra[current] = append(d.writtenInEra[current], e)
	}
}

func (d *eraDevice) place() blockdev.Extent {
	length := (1 + d.rng.Int64N(100)) * 4096
	if d.rng.IntN(3) > 0 {
		length = 4096
	}
	offset := d.rng.Int64N((d.size-length)/4096+1) * 4096
	if d.rng.IntN(20) == 0 {
		offset = d.size - length
	}
	return blockdev.Extent{Offset: offset, Length: length}
}

// want is what was written in the eras from since to before, before not
// included, in whole blocks.
func (d *eraDevice) want(since, before uint32) []blockdev.Extent {
	var list []blockdev.Extent
	for e, written := range d.writtenInEra {
		if e < since || e >= before {
			continue
		}
		for _, w := range written {
			first, end := w.Offset/d.blockSize, (w.End()-1)/d.blockSize+1
			list = append(list, blockdev.Extent{Offset: first * d.blockSize, Length: (end - first) * d.blockSize})
		}
	}
	return blockdev.Normalize(list)
}

// mustMatch compares our answers for every era with the log of the writes.
func (d *eraDevice) mustMatch(what string, current, before uint32, answer func(since uint32) ([]blockdev.Extent, error)) {
	d.t.Helper()
	for since := uint32(1); since <= current; since++ {
		got, err := answer(since)
		if err != nil {
			d.t.Fatalf("%s, since %d: %v", what, since, err)
		}
		if want := d.want(since, before); !slices.Equal(got, want) {
			d.t.Fatalf("%s, since %d:\n got %v\nwant %v", what, since, got, want)
		}
	}
}

// checkSnapshot compares the held metadata snapshot.
func (d *eraDevice) checkSnapshot() {
	d.t.Helper()
	_, block := d.status()
	m := openDevice(d.t, d.metadata)
	s, err := era.ReadSuperblock(m, block)
	if err != nil {
		d.t.Fatal(err)
	}
	d.mustMatch("metadata snapshot", s.CurrentEra, s.CurrentEra, func(since uint32) ([]blockdev.Extent, error) {
		return era.Changed(m, block, since)
	})
}

// checkPowerCut compares the metadata as a power cut would leave it: a copy
// in whose making no commit fell.
func (d *eraDevice) checkPowerCut() {
	d.t.Helper()
	m := openDevice(d.t, d.metadata)
	head := func() []byte {
		b := blockdev.AlignedBuffer(4096)
		if _, err := m.ReadAt(b, 0); err != nil {
			d.t.Fatal(err)
		}
		return b
	}
	all := blockdev.AlignedBuffer(int(m.Size()))
	for try := 0; ; try++ {
		before := head()
		if _, err := m.ReadAt(all, 0); err != nil {
			d.t.Fatal(err)
		}
		if bytes.Equal(before, head()) && bytes.Equal(before, all[:4096]) {
			break
		}
		if try == 100 {
			d.t.Fatal("the metadata never came to rest")
		}
	}
	s, err := era.ReadSuperblock(bytes.NewReader(all), 0)
	if err != nil {
		d.t.Fatal(err)
	}
	d.mustMatch("after a power cut", s.CurrentEra, s.CurrentEra+1, func(since uint32) ([]blockdev.Extent, error) {
		return era.ChangedInactive(bytes.NewReader(all), since)
	})
}

// invalidated asks the kernel developers' own tool the same question.
func (d *eraDevice) invalidated(since uint32) []blockdev.Extent {
	d.t.Helper()
	var answer struct {
		Blocks []struct {
			Block int64 `xml:"block,attr"`
		} `xml:"block"`
		Ranges []struct {
			Begin int64 `xml:"begin,attr"`
			End   int64 `xml:"end,attr"`
		} `xml:"range"`
	}
	text := run(d.t, "era_invalidate", "--written-since", fmt.Sprint(since), d.metadata)
	if err := xml.Unmarshal([]byte(text), &answer); err != nil {
		d.t.Fatalf("era_invalidate: %v\n%s", err, text)
	}
	var list []blockdev.Extent
	for _, b := range answer.Blocks {
		list = append(list, blockdev.Extent{Offset: b.Block * d.blockSize, Length: d.blockSize})
	}
	for _, r := range answer.Ranges {
		list = append(list, blockdev.Extent{Offset: r.Begin * d.blockSize, Length: (r.End - r.Begin) * d.blockSize})
	}
	return blockdev.Normalize(list)
}

// Promise 1 (nothing is missed): after random writes over several eras our
// reader, the tools and the log of the writes say the same, for every era: in
// a metadata snapshot while writes go on, as after a power cut, suspended, and
// cleanly taken down.
func TestEraMetadata(t *testing.T) {
	inGuest(t, guest{Modules: []string{"dm-zero"}}, func(t *testing.T) {
		metadata := ramDisks(t, 1, 8<<20)[0]
		for _, c := range []struct {
			name            string
			size, blockSize int64
			writes, eras    int
		}{
			{"one array block", 60<<20 + 20<<10, 64 << 10, 20, 5},
			{"several array blocks", 4<<30 + 4<<10, 64 << 10, 60, 7},
			{"a tree of two levels", 20 << 30, 64 << 10, 60, 4},
			{"large blocks", 20<<30 + 36<<10, 1 << 20, 60, 5},
		} {
			t.Run(c.name, func(t *testing.T) {
				d := newEraDevice(t, metadata, c.size, c.blockSize, uint64(c.eras))
				for i := range c.eras {
					d.write(c.writes)
					d.checkPowerCut()
					switch i % 3 {
					case 0:
						run(t, "dmsetup", "message", "era", "0", "checkpoint")
					case 1:
						run(t, "dmsetup", "message", "era", "0", "take_metadata_snap")
						d.write(c.writes)
						d.checkSnapshot()
						run(t, "dmsetup", "message", "era", "0", "checkpoint")
						d.write(c.writes)
						d.checkSnapshot()
						run(t, "dmsetup", "message", "era", "0", "drop_metadata_snap")
					case 2:
						run(t, "dmsetup", "suspend", "era")
						d.checkPowerCut()
						run(t, "dmsetup", "resume", "era")
					}
				}
				d.write(c.writes)
				current, _ := d.status()
				// Cleanly: the tool ignores a writeset that was not archived.
				run(t, "dmsetup", "remove", "era")
				m := openDevice(t, metadata)
				d.mustMatch("taken down", current, current+1, func(since uint32) ([]blockdev.Extent, error) {
					return era.ChangedInactive(m, since)
				})
				for since := uint32(1); since <= current; since++ {
					if got, want := d.invalidated(since), d.want(since, current+1); !slices.Equal(got, want) {
						t.Fatalf("era_invalidate, since %d:\n got %v\nwant %v", since, got, want)
					}
				}
			})
		}
	})
}
