package protocol

import (
	"bytes"
	"context"
	"encoding/binary"
	"reflect"
	"testing"

	"blockferry/blockdev/blocktest"
)

func testSuperblock(t testing.TB) *superblock {
	l, err := layoutFor(64<<20, testOptions(testVolume))
	if err != nil {
		t.Fatal(err)
	}
	sb := &superblock{sequence: 5, volume: [16]byte{1}, replica: [16]byte{2}, layout: l, state: DiskConsistent,
		applied: Position{Generation{4}, 9}, committed: Position{Generation{4}, 11}, applying: 10, mapBase: 3, cutNanos: -4,
		tail: cursor{8 << 20, 77, 0xabcdef01}, head: cursor{9 << 20, 80, 5}, lineage: Lineage{{Generation{3}, 2}, {Generation{4}, 9}}}
	sb.watched = watchPlaces(l.size)
	sb.watched[1].digest[31] = 9
	return sb
}

func TestSuperblockSaysWhatItWasTold(t *testing.T) {
	want := testSuperblock(t)
	got, err := decodeSuperblock(want.encode())
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("%+v, want %+v: %v", got, want, err)
	}
	// The longest there can be.
	for want.lineage = nil; len(want.lineage) < MaxGenerations; {
		n := len(want.lineage) + 1
		want.lineage = append(want.lineage, Position{Generation{1, byte(n)}, uint64(n)})
	}
	want.applied = want.lineage.Tip()
	want.watched = watchPlaces(want.layout.size)[:4]
	for len(want.watched) < maxWatched {
		want.watched = append(want.watched, watchedPlace{offset: 4096, length: 4096, digest: [32]byte{0: 1, 31: 8}})
	}
	if got, err = decodeSuperblock(want.encode()); err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("%+v, want %+v: %v", got, want, err)
	}
}

func FuzzSuperblock(f *testing.F) {
	f.Add(testSuperblock(f).encode())
	blank := testSuperblock(f)
	blank.state, blank.lineage, blank.applied, blank.watched = DiskBlank, nil, Position{}, nil
	f.Add(blank.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == superBytes { // also what has the right checksum
			b = bytes.Clone(b)
			binary.LittleEndian.PutUint32(b[12:], 0)
			binary.LittleEndian.PutUint32(b[12:], crc32c(b))
		}
		s, err := decodeSuperblock(b)
		if err != nil {
			return
		}
		if s.layout.size <= 0 || s.layout.journal.length <= 0 || s.layout.changeMap.offset < s.layout.dataOffset+s.layout.size {
			t.Fatalf("accepted %+v", s.layout)
		}
		if again, err := decodeSuperblock(s.encode()); err != nil || !reflect.DeepEqual(s, again) {
			t.Fatalf("%+v, then %+v: %v", s, again, err)
		}
	})
}

func testCommit() commitRecord {
	return commitRecord{frames: 3, segments: 1, cutNanos: 99, full: true,
		streams: []StreamSum{{Frames: 3, Digest: [32]byte{1, 2}}, {}}, lineage: Lineage{{Generation{1}, 4}, {Generation{2}, 5}}}
}

func TestCommitRecordFits(t *testing.T) {
	c := testCommit()
	got, err := decodeCommit(c.append(nil))
	if err != nil || !reflect.DeepEqual(*got, c) {
		t.Fatalf("%+v: %v", got, err)
	}
	c.streams = make([]StreamSum, MaxStreams)
	for len(c.lineage) < MaxGenerations {
		n := len(c.lineage)
		c.lineage = append(c.lineage, Position{Generation{3, byte(n)}, uint64(4 + n)})
	}
	b := c.append(nil)
	if _, err := decodeCommit(b); err != nil || len(b)+segHeaderBytes > commitMaxBytes {
		t.Errorf("the longest record has %d bytes: %v", len(b), err)
	}
}

func FuzzCommitRecord(f *testing.F) {
	c := testCommit()
	f.Add(c.append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := decodeCommit(b)
		if err == nil && !bytes.Equal(c.append(nil), b) {
			t.Fatal("accepted a record that would not be written so")
		}
	})
}

// A segment that was lost leaves an older one in its place, which fits but for
// what it was chained to.
func TestStaleSegmentBreaksTheChain(t *testing.T) {
	rg := ring{blocktest.NewMemory(4 << 20), area{0, 4 << 20}, 7}
	write := func(fill byte) cursor {
		w := newSegmentWriter(rg, cursor{0, 1, 2}, 5, 1, newRunPool())
		for i := range int64(6) {
			b := AppendFrames(nil, FrameMeta{5, 1, 1}, i<<18, bytes.Repeat([]byte{fill}, 1<<18), nil)
			f, err := NewFrameReader(b).Next()
			must(t, err)
			must(t, w.add(f))
		}
		c := testCommit()
		c.frames = 6
		must(t, w.commit(c))
		return w.next
	}
	write(1)
	old := make([]byte, 1<<20)
	must(t, rg.read(old, 1<<20)) // of the second segment and the commit
	end := write(2)
	if p, _, err := rg.readEpoch(context.Background(), cursor{0, 1, 2}, 4<<20, 4<<20); err != nil || p.end != end {
		t.Fatal(p, err)
	}
	first, err := rg.readHeader(cursor{0, 1, 2})
	must(t, err)
	second := first.next().logical
	must(t, rg.write(old[second-1<<20:], second))
	if _, at, err := rg.readEpoch(context.Background(), cursor{0, 1, 2}, 4<<20, 4<<20); err == nil || at.logical != second {
		t.Fatalf("at %d: %v, want an error at %d", at.logical, err, second)
	}
}

// FuzzSegment lays anything over the first segment of a ring, with right
// checksums, and reads an epoch from it.
func FuzzSegment(f *testing.F) {
	mem := blocktest.NewMemory(4 << 20)
	rg := ring{mem, area{0, 4 << 20}, 7}
	at := cursor{4<<20 - 8192, 3, 9} // it runs over the end
	w := newSegmentWriter(rg, at, 5, 1, newRunPool())
	frames := AppendFrames(nil, FrameMeta{5, 1, 1}, 0, bytes.Repeat([]byte("text"), 2048), nil)
	for fr := NewFrameReader(AppendZeroFrames(frames, FrameMeta{5, 1, 2}, Range{0, 8192})); fr.More(); {
		fm, err := fr.Next()
		if err == nil {
			err = w.add(fm)
		}
		if err != nil {
			f.Fatal(err)
		}
	}
	c := testCommit()
	c.frames = 2
	if err := w.commit(c); err != nil {
		f.Fatal(err)
	}
	limit := at.logical + 4<<20
	if p, _, err := rg.readEpoch(context.Background(), at, limit, 1<<20); err != nil || p.position().Epoch != 5 || p.end != w.next {
		f.Fatal(p, err)
	}
	seed := make([]byte, 6*BlockSize)
	if err := rg.read(seed, at.logical); err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add(seed[:100])
	f.Fuzz(func(t *testing.T, b []byte) {
		rg := ring{mem.Clone(), rg.area, rg.tag}
		b = append(bytes.Clone(b), make([]byte, 2*BlockSize)...)
		b = b[:min(len(b), 1<<20)/BlockSize*BlockSize]
		le := binary.LittleEndian
		if n := int(le.Uint32(b[60:])); n <= len(b)-segHeaderBytes {
			le.PutUint32(b[64:], crc32c(b[segHeaderBytes:segHeaderBytes+n]))
		}
		le.PutUint32(b[12:], 0)
		le.PutUint32(b[12:], crc32c(b[:segHeaderBytes]))
		if err := rg.write(b, at.logical); err != nil {
			t.Fatal(err)
		}
		p, _, err := rg.readEpoch(context.Background(), at, limit, 1<<20)
		if err != nil {
			return
		}
		if p.end.logical > limit || p.end.logical <= at.logical || p.commit.lineage.Check() != nil || p.rounds.n > MaxRounds {
			t.Fatalf("accepted %+v", p)
		}
	})
}
