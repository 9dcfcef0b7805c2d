package protocol

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"blockferry/blockdev/blocktest"
)

// rot changes one bit in each of some blocks of a replica's data area, past the replica.
func rot(t *testing.T, store *blocktest.Memory, blocks ...int64) {
	t.Helper()
	for _, b := range blocks {
		flip(t, store, b*BlockSize+b%BlockSize, int(b%8))
	}
}

// blockRanges are single blocks, ascending, joined.
func blockRanges(blocks ...int64) (out []Range) {
	for _, b := range blocks {
		out = appendRange(out, Range{b * BlockSize, BlockSize})
	}
	return out
}

// repair is Primary.Repair with a limit; asked is called before anything is sent.
func (r *rig) repair(replica string, asked func()) (RepairResult, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return r.p.Repair(ctx, replica, nil, func(VerifyResult) {
		if asked != nil {
			asked()
		}
	})
}

// What rotted at a replica, be it zeros or data, it gets again by a journaled epoch, and nothing else,
// while the volume is written to; also where frozen views hold only what changed.
func TestRepair(t *testing.T) {
	for _, frozen := range []int64{0, 200 * BlockSize} {
		for _, grain := range []int64{BlockSize, 64 << 10} {
			t.Run(fmt.Sprintf("frozen %d, grain %d", frozen, grain), func(t *testing.T) {
				t.Parallel()
				src := newMemSource(testVolumeSize, grain)
				src.frozenMax = frozen
				wroteSome(src, 0, 1700) // some of it zeros, none behind it
				n := newNode(t, "ebs", testVolumeSize, 32<<20)
				r := startRig(t, src, &memState{}, []*node{n}, nil)
				r.sync()
				n.check(src)
				if res, err := r.repair("ebs", func() { t.Error("there was nothing to ask about") }); err != nil || !res.Found.Same() || res.Found.TotalBytes != testVolumeSize || res.Epoch != 0 {
					t.Fatalf("nothing to repair: %+v, %v", res, err)
				}
				rotten := []int64{1300, 1301, 1302, 1303, 1304, 1305, 1306, 1600, 1900, testVolumeSize/BlockSize - 1}
				rot(t, n.store, rotten...)
				stop := src.busyWithin(t, 11, 2*time.Millisecond, 1000)
				before := uint64(0)
				res, err := r.repair("ebs", func() {
					before = r.last("ebs").Epoch
					b := make([]byte, BlockSize)
					for _, at := range rotten {
						if _, err := n.store.ReadAt(b, at*BlockSize); err != nil {
							t.Error(err)
						}
						want := make([]byte, BlockSize)
						content(want, at, src.blockAt(at))
						if bytes.Equal(b, want) {
							t.Errorf("block %d was repaired before anybody was told", at)
						}
					}
				})
				if err != nil || !slices.Equal(res.Found.Differences, blockRanges(rotten...)) || res.Found.DifferentBytes != 10*BlockSize {
					t.Fatalf("found %+v, %v", res.Found, err)
				}
				if res.SentBytes != 10*BlockSize || res.Epoch <= before || !res.Left.Same() || res.Left.TotalBytes != testVolumeSize {
					t.Fatalf("after epoch %d: %+v", before, res)
				}
				stop()
				r.sync()
				n.check(src)
				for _, e := range r.epochs("ebs")[1:] {
					if e.Action != "incremental" {
						t.Errorf("epoch %+v", e)
					}
				}
			})
		}
	}
}

func (s *memSource) blockAt(b int64) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.blocks[b]
}

// What differs is compared once more before it is sent: a disk that now reads right gets nothing. One that
// rots again is told of.
func TestRepairLooksTwice(t *testing.T) {
	src, n, r := syncedRig(t, BlockSize, 1700)
	n.check(src)
	rot(t, n.store, 1500, 1600)
	res, err := r.repair("ebs", func() { rot(t, n.store, 1500, 1600) }) // the bits are back
	if err != nil || res.Found.DifferentBytes != 2*BlockSize || res.SentBytes != 0 || res.Epoch == 0 || !res.Left.Same() {
		t.Fatalf("%+v, %v", res, err)
	}
	// Another place rots while the first is repaired.
	rot(t, n.store, 1600)
	res, err = r.repair("ebs", func() { rot(t, n.store, 1400) })
	if err != nil || res.SentBytes != BlockSize || !slices.Equal(res.Left.Differences, blockRanges(1400)) {
		t.Fatalf("%+v, %v", res, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var second error
	rot(t, n.store, 1600)
	if res, err = r.repair("ebs", func() { _, second = r.p.Verify(ctx, "ebs", nil) }); err != nil || !res.Left.Same() || res.SentBytes != 2*BlockSize {
		t.Fatalf("%+v, %v", res, err)
	}
	if second == nil || !strings.Contains(second.Error(), "verified already") {
		t.Errorf("a second verify beside a repair: %v", second)
	}
	if v, err := r.p.Verify(ctx, "ebs", nil); err != nil || !v.Same() {
		t.Errorf("a verify after a repair: %+v, %v", v, err)
	}
	if _, err := r.repair("nobody", nil); err == nil {
		t.Error("an unknown replica was repaired")
	}
}

// A session that ends before the repair's commit is said to have ended it, whatever came of the epoch, and
// the next repair does the rest. So does one that its caller gives up.
func TestRepairEndsWithItsSession(t *testing.T) {
	src, n, r := syncedRig(t, BlockSize, 1700)
	n.check(src)
	rot(t, n.store, 1500, 1600)
	again := func(why string) {
		t.Helper()
		eventually(t, "it is connected again", func() bool { return r.p.Status().Replicas[0].Replication != "Off" })
		r.sync()
		res, err := r.repair("ebs", nil)
		if err != nil || !res.Left.Same() {
			t.Fatalf("%s: %+v, %v", why, res, err)
		}
		n.check(src)
	}
	flushed := func(do func()) { // of every cut from now on, before its commit
		src.mu.Lock()
		defer src.mu.Unlock()
		src.flushErr = nil
		if do != nil {
			src.flushErr = func(uint64) error { do(); return nil }
		}
	}
	res, err := r.repair("ebs", func() { flushed(n.cutWires) })
	flushed(nil)
	if err == nil || !strings.Contains(err.Error(), "session ended before") || res.Found.DifferentBytes != 2*BlockSize || res.Epoch != 0 {
		t.Fatalf("without a session: %+v, %v", res, err)
	}
	again("after a lost session")

	rot(t, n.store, 1500)
	res, err = r.repair("ebs", func() {
		must(t, r.p.Pause("ebs"))
		eventually(t, "the session ends", func() bool {
			return r.p.Status().Replicas[0].Replication == "Paused" && n.recv.Status()[0].Session == nil
		})
	})
	if err == nil || !strings.Contains(err.Error(), "not connected: paused") || res.Found.DifferentBytes != BlockSize {
		t.Fatalf("while paused: %+v, %v", res, err)
	}
	must(t, r.p.Resume("ebs"))
	again("after a pause")

	rot(t, n.store, 1500)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if res, err = r.p.Repair(ctx, "ebs", nil, func(VerifyResult) { cancel() }); !errors.Is(err, context.Canceled) || res.Found.DifferentBytes != BlockSize || res.Epoch != 0 {
		t.Fatalf("given up: %+v, %v", res, err)
	}
	again("given up before")
}

// Without a tracker that can tell all is compared, through the journal, and that is the repair. In place none is ever
// done: what does not fit into the journal stays as it is, and so does what is allowed for changes.
func TestRepairOtherPlans(t *testing.T) {
	src, n, r := syncedRig(t, BlockSize, 1700)
	n.check(src)
	rot(t, n.store, 1500, 1600)
	res, err := r.repair("ebs", func() {
		src.mu.Lock()
		defer src.mu.Unlock()
		src.lostBefore = src.cut + 2
	})
	if err != nil || res.SentBytes != 2*BlockSize || !res.Left.Same() || !slices.ContainsFunc(r.epochs("ebs"), func(e EpochStats) bool { return e.Action == "compare" }) {
		t.Fatalf("%+v, %v", res, err)
	}
	n.check(src)

	src = newMemSource(testVolumeSize, BlockSize)
	wroteSome(src, 0, testVolumeSize/BlockSize)
	n = newNode(t, "ebs", testVolumeSize, MinJournalBytes)
	inPlace := func() (found bool) {
		r.mu.Lock()
		defer r.mu.Unlock()
		return slices.ContainsFunc(r.plans["ebs"][1:], func(p Plan) bool { return p.InPlace })
	}
	r = startRig(t, src, &memState{}, []*node{n}, func(c *PrimaryConfig) {
		c.Replicas[0].Link.Codec, c.Replicas[0].CatchUpInPlace = CodecNone, true
	})
	r.sync()
	n.check(src)
	for b := range int64(testVolumeSize / BlockSize) {
		if b > 20 {
			rot(t, n.store, b)
		}
	}
	res, err = r.repair("ebs", nil)
	if err == nil || !strings.Contains(err.Error(), "does not fit into the replica's journal") || res.Found.DifferentBytes != testVolumeSize-21*BlockSize {
		t.Fatalf("%+v, %v", res, err)
	}
	src.write(7)
	r.sync()
	if st := n.rep.Status(); st.State != DiskConsistent || inPlace() {
		t.Errorf("after a repair that did not fit: %v, in place %v", st.State, inPlace())
	}
}

// An attempt in place takes no repair, whichever is there first.
func TestNoRepairInPlace(t *testing.T) {
	p := &Primary{size: testVolumeSize, changed: make(chan struct{})}
	w := newReplicaWorker(p, ReplicaConfig{Name: "ebs"})
	for _, plan := range []Plan{{Action: Incremental, Since: 5, InPlace: true}, {Action: CompareAll, InPlace: true}, {Action: Incremental, Since: 5}} {
		w.repair = &repairJob{ranges: blockRanges(3), done: make(chan repairDone, 1)}
		job := w.repair
		a := newAttempt(w, &Link{}, plan)
		if plan.InPlace {
			if a.repair != nil || len(a.rest) > 0 || w.repair != nil || !errors.Is((<-job.done).err, errNotInPlace) {
				t.Errorf("%v: %+v", plan, a)
			}
		} else if a.repair != job || !slices.Equal(a.rest, job.ranges) || w.repair != job || !a.liveNext {
			t.Errorf("%v: %+v", plan, a)
		}
	}
}

// A copy that is repaired passes it on to who was fed with what had rotted: to the block
// while it is known, and by the change map.
func TestRepairIsPassedOn(t *testing.T) {
	src := newMemSource(testVolumeSize, BlockSize)
	wroteSome(src, 0, 1700)
	middle, last := newNode(t, "middle", testVolumeSize, 32<<20), newNode(t, "last", testVolumeSize, 32<<20)
	up := startRig(t, src, &memState{}, []*node{middle}, nil)
	up.sync()
	middle.check(src)
	rot(t, middle.store, 1500)
	down := startFollower(t, middle, []*node{last}, nil)
	before := level(t, last, middle).Committed.Epoch
	b, want := make([]byte, BlockSize), make([]byte, BlockSize)
	content(want, 1500, src.blockAt(1500))
	if _, err := last.store.ReadAt(b, 1500*BlockSize); err != nil || bytes.Equal(b, want) {
		t.Fatalf("what had rotted was not passed on: the test shows nothing; %v", err)
	}
	if res, err := up.repair("middle", nil); err != nil || res.SentBytes != BlockSize || !res.Left.Same() {
		t.Fatalf("%+v, %v", res, err)
	}
	up.sync()
	level(t, last, middle)
	last.check(src)
	image, err := middle.rep.Hold(t.Context())
	must(t, err)
	defer image.Release()
	changed, err := image.ChangedSince(before)
	if err != nil || !slices.ContainsFunc(changed, func(r Range) bool { return r.Offset <= 1500*BlockSize && r.End() > 1500*BlockSize }) {
		t.Errorf("the change map names %v after epoch %d; %v", changed, before, err)
	}
	for _, e := range down.epochs("last")[1:] {
		if e.Action != "incremental" || e.Link.SentBytes > 2*BlockSize {
			t.Errorf("epoch %+v", e)
		}
	}
}

// Wherever the replica fails and its power goes, from the first look at it to the last: it is one cut, whole,
// but for what had rotted, which is as it was or repaired. The next repair does what is left.
func TestRepairSurvivesPowerCuts(t *testing.T) {
	t.Parallel()
	const size = 4 << 20
	synced, state := newMemSource(size, BlockSize), &memState{}
	wroteSome(synced, 0, 450)
	n := newNode(t, "ebs", size, MinJournalBytes)
	first := startRig(t, synced, state, []*node{n}, nil)
	first.sync()
	n.check(synced)
	first.stop()
	dev := n.store.Clone()
	rotten := []int64{340, 341, 342, 400, 470} // none of them at a place that is looked at when the replica is opened
	rot(t, dev, rotten...)
	src, repairs := synced, 0 // of each try its own
	do := func(store *blocktest.Memory) error {
		rep, err := OpenReplica(t.Context(), store, OpenOptions{})
		if err != nil {
			return err
		}
		recv := NewReceiver(ReceiverConfig{WindowBytes: 2 << 20})
		must(t, recv.Add("ebs", rep))
		src = newMemSource(size, BlockSize)
		copy(src.blocks, synced.blocks)
		copy(src.marks, synced.marks)
		src.last, src.cut, src.written, src.images = synced.last, synced.cut, synced.written, maps.Clone(synced.images)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		r := startRig(t, src, &memState{b: state.b}, nil, func(c *PrimaryConfig) {
			c.Replicas = []ReplicaConfig{{Name: "ebs", Client: LocalClient(recv)}}
			c.Events.Disconnected = func(string, error) { cancel() } // a look would wait for the next session
		})
		var res RepairResult
		if err = r.p.waitFor(ctx, func() bool { return r.p.workers[0].connected }); err == nil {
			res, err = r.p.Repair(ctx, "ebs", nil, func(VerifyResult) { src.write(50) })
		}
		r.stop()
		recv.Close()
		if err = errors.Join(err, rep.Close()); err != nil {
			return err
		}
		if !slices.Equal(res.Found.Differences, blockRanges(rotten...)) || res.SentBytes != int64(len(rotten))*BlockSize || !res.Left.Same() {
			t.Fatalf("%+v", res)
		}
		repairs++
		return nil
	}
	states := map[string]int{}
	somePowerCuts(t, dev, 4, do, func(t *testing.T, after *blocktest.Memory) {
		rep, err := OpenReplica(t.Context(), after, OpenOptions{})
		must(t, err)
		defer rep.Close()
		image, err := rep.Hold(t.Context()) // that there is one says that it is consistent
		must(t, err)
		defer image.Release()
		blocks := src.image(image.Position().Epoch)
		got, want := make([]byte, BlockSize), make([]byte, BlockSize)
		old := 0
		for b, k := range blocks {
			_, err := image.ReadAt(got, int64(b)*BlockSize)
			must(t, err)
			content(want, int64(b), k)
			if slices.Contains(rotten, int64(b)) && !bytes.Equal(got, want) {
				want[int64(b)%BlockSize] ^= 1 << (b % 8)
				old++
			}
			if !bytes.Equal(got, want) {
				t.Fatalf("at %v block %d is neither what it was nor what it should be", image.Position(), b)
			}
		}
		switch old {
		case 0:
			states["repaired"]++
		case len(rotten):
			states["as it was"]++
		default:
			t.Fatalf("%d of %d blocks are repaired at %v", len(rotten)-old, len(rotten), image.Position())
		}
	})
	if states["repaired"] == 0 || states["as it was"] == 0 || repairs != 3 {
		t.Errorf("%v, %d repairs", states, repairs)
	}
	t.Logf("%v", states)
}
