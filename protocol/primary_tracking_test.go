package protocol

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"
)

// What was lost once is compared at once; losing it again and again is not done at full
// speed.
func TestLostTrackingIsComparedAtOnce(t *testing.T) {
	src := newMemSource(testVolumeSize, BlockSize)
	wroteSome(src, 0, 500)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	r := startRig(t, src, &memState{}, []*node{n}, func(c *PrimaryConfig) { c.RetryMin, c.RetryMax = time.Hour, time.Hour })
	for range 2 {
		r.sync()
		src.mu.Lock()
		src.lostBefore = src.cut + 1
		src.mu.Unlock()
		wroteSome(src, 0, 10)
	}
	r.sync()
	n.check(src)
	r.mu.Lock()
	if len(r.voids) != 2 {
		t.Errorf("voids: %v", r.voids)
	}
	r.mu.Unlock()
	src.mu.Lock()
	src.lostBefore = 1 << 60 // for good
	src.mu.Unlock()
	wroteSome(src, 0, 10)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if _, _, err := r.p.SyncNow(ctx); err == nil {
		t.Error("synced without any tracking within the wait")
	}
}

// Lost tracking means: compare everything, into the journal, and send only
// what differs.
func TestTrackingLost(t *testing.T) {
	src, n, r := syncedRig(t, 64<<10, 2000)
	n.mu.Lock()
	n.down = true
	n.mu.Unlock()
	n.cutWires()
	wroteSome(src, 300, 10)
	src.mu.Lock()
	src.lostBefore = src.cut + 1
	src.mu.Unlock()
	n.mu.Lock()
	n.down = false
	n.mu.Unlock()
	done := n.watch(src)
	r.sync()
	done()
	e := r.last("ebs")
	if e.Action != "compare" || e.Link.ComparedBytes < testVolumeSize || e.Link.SentBytes != 10*BlockSize {
		t.Fatalf("%+v", e)
	}
	if st := n.rep.Status(); st.State != DiskConsistent {
		t.Fatalf("the replica is %v", st.State)
	}
	n.check(src)
	wroteSome(src, 300, 5)
	r.sync()
	if e := r.last("ebs"); e.Action != "incremental" {
		t.Fatalf("the next epoch: %+v", e)
	}
}

// A tracker that never answers again costs comparisons; the replica is kept up
// to date all the same.
func TestTrackingLostForGood(t *testing.T) {
	src, n, r := syncedRig(t, 64<<10, 2000)
	src.mu.Lock()
	src.lostBefore = 1 << 60
	src.mu.Unlock()
	for i := range int64(3) {
		wroteSome(src, 300*i, 10)
		r.sync()
		if e := r.last("ebs"); e.Action != "compare" {
			t.Fatalf("%+v", e)
		}
		n.check(src)
	}
	src.mu.Lock()
	src.lostBefore = src.cut + 1
	src.mu.Unlock()
	wroteSome(src, 300, 10)
	r.sync()
	wroteSome(src, 300, 5)
	r.sync()
	if e := r.last("ebs"); e.Action != "incremental" {
		t.Fatalf("the tracker answers again: %+v", e)
	}
	n.check(src)
}

// The same for a copy in place that takes longer than a view is held for, and
// whose views do not all last: it ends, and says meanwhile what is wrong.
func TestTrackingLostForGoodInPlace(t *testing.T) {
	src := newMemSource(testVolumeSize, 64<<10)
	wroteSome(src, 0, 2000)
	void := 0
	src.validErr = func(uint64) error {
		if void++; void <= 2 {
			return errors.New("the copy-on-write store is full")
		}
		return nil
	}
	src.lostBefore, src.readDelay = 1<<60, 20*time.Millisecond
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	var mu sync.Mutex
	said := ""
	r := startRig(t, src, &memState{}, []*node{n}, func(c *PrimaryConfig) {
		c.CutLimit, c.Replicas[0].Link.BatchBytes = 30*time.Millisecond, 64<<10
		c.Events.Behind = func(_, reason string, _ error) { mu.Lock(); said += reason + "\n"; mu.Unlock() }
	})
	r.sync()
	n.check(src)
	if e := r.last("ebs"); e.Action != "compare" {
		t.Fatalf("%+v", e)
	}
	r.mu.Lock()
	if n := strings.Count(strings.Join(r.voids, "\n"), "tracking lost"); n != 1 {
		t.Errorf("the tracker was relied on %d times, once it was to be tried: %q", n, r.voids)
	}
	r.mu.Unlock()
	mu.Lock()
	defer mu.Unlock()
	for _, want := range []string{"tracking is lost", "the copy-on-write store is full"} {
		if !strings.Contains(said, want) {
			t.Errorf("'%s' was never a reason to be behind:\n%s", want, said)
		}
	}
}

// Coarse marks are narrowed: what is sent is what was written.
func TestMarksAreNarrowed(t *testing.T) {
	src, n, r := syncedRig(t, 1<<20, 2000)
	for _, b := range []int64{5, 304, 305, 1500, 2050} {
		src.write(b)
	}
	r.sync()
	if e := r.last("ebs"); e.Link.SentBytes != 5*BlockSize || e.Link.MarkedBytes < 3<<20 {
		t.Fatalf("five blocks were written: %+v", e.Link)
	}
	n.check(src)
}

// A, then B in a live round, then A again: the comparison with the committed
// image must not leave the B of the live round in the journal.
func TestBackToTheOldContentWithinAnEpoch(t *testing.T) {
	src := newMemSource(testVolumeSize, BlockSize)
	wroteSome(src, 0, 100)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	link, err := Connect(t.Context(), n.client(), LinkConfig{VolumeUUID: testUUID, SizeBytes: testVolumeSize, Replica: "ebs"}, line(1, 2))
	if err != nil {
		t.Fatal(err)
	}
	defer link.Close()
	all := []Range{{0, testVolumeSize}}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	round := func(number uint32, content byte, narrow bool) {
		t.Helper()
		_, err := link.SendRound(t.Context(), Round{Number: number, Source: bytes.NewReader(bytes.Repeat([]byte{content}, testVolumeSize)), Ranges: all, Narrow: narrow})
		must(err)
	}
	holds := func(want byte) {
		t.Helper()
		img, err := n.rep.Hold(t.Context())
		must(err)
		defer img.Release()
		b := make([]byte, testVolumeSize)
		_, err = img.ReadAt(b, 0)
		must(err)
		if !bytes.Equal(b, bytes.Repeat([]byte{want}, len(b))) {
			t.Fatalf("the replica does not hold %q", want)
		}
	}
	must(link.Begin(t.Context(), EpochStart{Epoch: 1, Mode: ModeInPlace, Full: true, Lineage: line(1, 1)}, false))
	round(0, 'A', false)
	round(1, 'B', true)
	round(2, 'A', true)
	must(link.Commit(t.Context(), line(1, 2), 0))
	holds('A')
	must(link.Begin(t.Context(), EpochStart{Epoch: 3, Mode: ModeJournal, Lineage: line(1, 3)}, false))
	round(0, 'B', true)
	round(1, 'A', true)
	must(link.Commit(t.Context(), line(1, 3), 0))
	holds('A')
}
