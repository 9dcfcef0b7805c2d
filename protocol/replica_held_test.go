package protocol

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"testing"
	"time"

	"blockferry/blockdev/blocktest"
)

// copied is a model that goes its own way from here.
func (m *model) copied() *model {
	c := *m
	c.image, c.images, c.asked, c.lineage = bytes.Clone(m.image), maps.Clone(m.images), maps.Clone(m.asked), m.lineage.Clone()
	return &c
}

// Promise 2 for a snapshot of the device, and for a power cut, at any moment while it is held:
// the data area is the epoch named, mountable as it is, and the device is a replica that
// holds that one or a later.
func TestHeldDeviceIsAReplicaAtEachMoment(t *testing.T) {
	m, dev, r := synced(t, 31)
	must(t, m.send(r, epochPlan{mode: ModeJournal, blocks: 6, codec: CodecS2}))
	must(t, r.WaitApplied(t.Context(), m.acked.Epoch))
	must(t, r.Close())
	var w *model // of the try under way
	var held Position
	snapshots, ahead := 0, 0
	do := func(d *blocktest.Memory) error {
		w, held = m.copied(), Position{}
		r, err := OpenReplica(context.Background(), d, OpenOptions{})
		if err != nil {
			return err
		}
		defer r.Close()
		image, err := r.HoldDevice(context.Background())
		if err != nil {
			return err
		}
		held = image.Position()
		for range 3 {
			if err := w.send(r, epochPlan{mode: ModeJournal, blocks: 4, codec: CodecS2}); err != nil {
				return err
			}
		}
		return image.Err()
	}
	look := func(t *testing.T, after *blocktest.Memory) {
		snapshots++
		if held.IsZero() {
			return // it was not held yet
		}
		if held != m.acked {
			t.Fatalf("held at %v, want %v", held, m.acked)
		}
		got := make([]byte, m.size)
		_, err := after.ReadAt(got, 0)
		must(t, err)
		if at := firstDifference(got, m.images[held]); at >= 0 {
			t.Fatalf("the data area is not the image of %v at %d", held, at)
		}
		must(t, w.check(after))
		if super(t, after).applied.Epoch > held.Epoch {
			ahead++
		}
	}
	eachPowerCut(t, dev, do, look)
	if snapshots < 300 || ahead < 100 {
		t.Errorf("%d moments, of %d the journal brought more: that shows little", snapshots, ahead)
	}
}

// One snapshot at a time, of an epoch; and the next can be taken when it has ended,
// however that was.
func TestHoldDeviceRefuses(t *testing.T) {
	m, _, r := synced(t, 32)
	image, err := r.HoldDevice(t.Context())
	must(t, err)
	if st := r.Status(); st.Held != m.acked {
		t.Errorf("held at %v, the status says %v", m.acked, st.Held)
	}
	if _, err := r.HoldDevice(t.Context()); !errors.Is(err, ErrHeld) {
		t.Fatalf("held twice: %v", err)
	}
	must(t, m.send(r, epochPlan{mode: ModeJournal, blocks: 1}))
	image.Release()
	image.Release()
	must(t, r.WaitApplied(t.Context(), m.acked.Epoch))
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	other, err := r.Hold(t.Context())
	must(t, err)
	must(t, m.send(r, epochPlan{mode: ModeJournal, blocks: 1}))
	if _, err := r.HoldDevice(gone); !errors.Is(err, context.Canceled) {
		t.Fatalf("nobody waited for it: %v", err)
	}
	other.Release()
	image, err = r.HoldDevice(t.Context())
	must(t, err)
	if image.Position() != m.acked {
		t.Errorf("held at %v, committed before was %v", image.Position(), m.acked)
	}
	must(t, r.Close())
	if err := image.Err(); !errors.Is(err, ErrClosed) {
		t.Errorf("of a replica that was closed: %v", err)
	}
	image.Release()
	// What a copy holds that strayed is no epoch.
	dev := testDevice(testVolume)
	o := testOptions(testVolume)
	o.Holds = &Holding{Lineage: Lineage{{Generation{1}, 5}}, Strayed: "written by hand"}
	must(t, FormatReplica(dev, o))
	if _, err := open(t, dev).HoldDevice(t.Context()); !errors.Is(err, ErrStrayed) {
		t.Errorf("of a copy that strayed: %v", err)
	}
}

// While the device is held nothing that it needs comes to lie in the spill file: such an
// epoch is committed before or after.
func TestHeldDeviceNeedsNoSpillFile(t *testing.T) {
	spill := &testSpill{limit: testSpillLimit}
	m, dev := newModel(t, 33, testVolume), testDevice(testVolume)
	must(t, FormatReplica(dev, testOptions(m.size)))
	r, err := OpenReplica(t.Context(), dev, spill.options())
	must(t, err)
	defer r.Close()
	must(t, m.send(r, epochPlan{mode: ModeInPlace, full: true, blocks: 2, codec: CodecS2}))
	whole := func(what string) {
		t.Helper()
		alone, err := OpenReplica(t.Context(), dev.Clone(), OpenOptions{})
		if err != nil {
			t.Fatalf("%s: the device alone is not taken: %v", what, err)
		}
		must(t, alone.Close())
	}
	image, err := r.HoldDevice(t.Context())
	must(t, err)
	at := m.acked
	done := make(chan error, 1)
	next := m.copied() // it is the only one that sends from here
	go func() { done <- next.send(r, spills) }()
	eventually(t, "all of the epoch is in journal and spill file", func() bool { return r.Status().SpilledBytes > 1<<20 })
	select {
	case err := <-done:
		t.Fatalf("committed with a part in the spill file while the device is held: %v", err)
	case <-time.After(50 * time.Millisecond): // too short only hides a fault
	}
	whole("while it is held")
	if st := r.Status(); st.Committed != at || st.Err != nil {
		t.Fatalf("%+v", st)
	}
	image.Release()
	must(t, <-done)
	must(t, r.WaitApplied(t.Context(), next.acked.Epoch))
	must(t, next.checkOpen(r))
	// The other way round: it is being committed when the device is asked for.
	inSync, goOn := make(chan struct{}), make(chan struct{})
	spill.syncing = func() {
		spill.syncing = nil
		close(inSync)
		<-goOn
	}
	go func() { done <- next.send(r, spills) }()
	<-inSync
	holding := make(chan *Image, 1)
	go func() {
		image, err := r.HoldDevice(context.Background())
		if err != nil {
			t.Error(err)
		}
		holding <- image
	}()
	eventually(t, "somebody waits for the device", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.device != nil
	})
	select {
	case <-holding:
		t.Fatal("held while an epoch is committed whose part in the spill file it needs")
	case <-time.After(50 * time.Millisecond):
	}
	close(goOn)
	must(t, <-done)
	image = <-holding
	if image == nil || image.Position() != next.acked {
		t.Fatalf("held at %v, committed was %v", image, next.acked)
	}
	whole("held after it")
	image.Release()
}

// Many epochs are committed while the device is held, and all of them are found after a
// crash, also if that took the newest superblock.
func TestHeldDeviceTakesManyEpochs(t *testing.T) {
	m, dev, r := synced(t, 34)
	image, err := r.HoldDevice(t.Context())
	must(t, err)
	for range maxPendingEpochs + 8 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		stop := context.AfterFunc(ctx, func() { image.Release() }) // a fault: it would wait for ever
		must(t, m.send(r, epochPlan{mode: ModeJournal, blocks: 1, codec: CodecZstd}))
		stop()
		cancel()
	}
	if n := r.Status().PendingEpochs; n != maxPendingEpochs+8 {
		t.Fatalf("%d epochs wait", n)
	}
	after := dev.Clone()
	sb := super(t, after)
	must(t, after.ZeroOut(superOffset(sb.layout, sb.sequence), superBytes))
	must(t, after.Flush())
	must(t, m.check(after))
	image.Release()
	must(t, r.WaitApplied(t.Context(), m.acked.Epoch))
	must(t, m.checkOpen(r))
}

// Replication goes on into the journal while the device is held, also with a tracker
// whose marks are compared first, and what the replica then holds is each cut's image. What waits in
// the journal is not taken for what lies below it.
func TestReplicationGoesOnWhileTheDeviceIsHeld(t *testing.T) {
	src, n, r := syncedRig(t, 1<<20, 1500)
	image, err := n.rep.HoldDevice(t.Context())
	must(t, err)
	at := image.Position()
	before := map[int64][]byte{}
	for _, b := range []int64{3, 700} {
		before[b] = make([]byte, BlockSize)
		_, err := image.ReadAt(before[b], b*BlockSize)
		must(t, err)
	}
	zero := func(b int64) { // back to what it was: equal to what is below, and not to what is committed
		src.mu.Lock()
		was := src.images[at.Epoch][b]
		src.mu.Unlock()
		src.write(b)
		r.sync()
		src.mu.Lock()
		src.blocks[b], src.marks[b*BlockSize/src.grain] = was, src.cut+1
		src.written += BlockSize
		src.mu.Unlock()
	}
	var last uint64
	for range 3 {
		zero(3)
		zero(700)
		last = r.sync()
	}
	if st := n.rep.Status(); st.Applied != at || st.PendingEpochs < 6 || st.Committed.Epoch < last {
		t.Fatalf("held at %v: %+v", at, st)
	}
	sent := r.last("ebs").Link
	if sent.SentBytes >= 1<<20 {
		t.Errorf("for one block %d bytes were sent: nothing was compared", sent.SentBytes)
	}
	for b, want := range before {
		got := make([]byte, BlockSize)
		_, err := image.ReadAt(got, b*BlockSize)
		must(t, err)
		if !bytes.Equal(got, want) {
			t.Errorf("block %d of the image that is held changed", b)
		}
	}
	must(t, image.Err())
	image.Release()
	must(t, n.rep.WaitApplied(t.Context(), last))
	if e := n.check(src); e < last {
		t.Errorf("it holds %d, %d was committed", e, last)
	}
	// A verify names no difference because of it.
	image, err = n.rep.HoldDevice(t.Context())
	must(t, err)
	src.write(9)
	verified := make(chan error, 1)
	go func() {
		v, err := r.p.Verify(t.Context(), "ebs", nil)
		if err == nil && !v.Same() {
			err = errors.New("a verify found differences")
		}
		verified <- err
	}()
	eventually(t, "an epoch waits", func() bool { return n.rep.Status().PendingEpochs > 0 })
	select {
	case err := <-verified:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(100 * time.Millisecond):
		image.Release()
		must(t, <-verified)
	}
	image.Release()
}
