package protocol

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"blockferry/proto"
)

// RestoreConfig says what is restored, from where and onto what. Zero values
// of the last five mean the defaults.
type RestoreConfig struct {
	VolumeUUID [16]byte
	Replica    string
	SizeBytes  int64
	Target     Store // its first SizeBytes are overwritten
	// From is the state last saved by an earlier try; nil begins anew.
	From *RestoreState
	// Save makes progress durable. It is called before the first write, so that a
	// half-filled device is never taken for a volume.
	Save     func(RestoreState) error
	Progress func(RestoreProgress) // may be nil

	Codec           Codec         // how the replica may pack what it sends
	Readers         int           // reads at once while comparing; 0: 8
	CheckpointBytes int64         // Save at least this often; 0: 256 MiB
	CheckpointEvery time.Duration // and this often; 0: 5 s
	Clock           Clock         // nil: the real one
}

// RestoreProgress is how far a restore has come.
type RestoreProgress struct {
	Phase      string // restoring, verifying
	DoneBytes  int64  // of the volume
	TotalBytes int64
	DataBytes  int64 // bytes in TotalBytes that came or come as data
}

// RestoreMismatchError says that the restored device does not hold what the
// replica holds. It must not be used; begin anew on a sound device.
type RestoreMismatchError struct {
	Target         string
	First          Range // 64 KiB grain
	DifferentBytes int64
}

func (e *RestoreMismatchError) Error() string {
	return fmt.Sprintf("%s: %d bytes differ from the replica after the restore, the first at %d: the device does not keep what is written; replace it and restore anew",
		e.Target, e.DifferentBytes, e.First.Offset)
}

// RestoreTo fills the target with a replica's committed image, then compares
// both. It returns the lineage the target then holds. After an error it may be called
// again with the state last saved: what is durable is not sent again. While
// it runs nobody else may write the target.
func RestoreTo(ctx context.Context, client proto.ReplicationClient, cfg RestoreConfig) (Lineage, error) {
	if cfg.Readers <= 0 {
		cfg.Readers = 8
	}
	if cfg.CheckpointBytes <= 0 {
		cfg.CheckpointBytes = 256 << 20
	}
	if cfg.CheckpointEvery <= 0 {
		cfg.CheckpointEvery = 5 * time.Second
	}
	if cfg.Clock == nil {
		cfg.Clock = realClock{}
	}
	if cfg.Progress == nil {
		cfg.Progress = func(RestoreProgress) {}
	}
	if cfg.Target.Size() < cfg.SizeBytes {
		return nil, fmt.Errorf("restore: %s has %d bytes, the volume %d", cfg.Target.Name(), cfg.Target.Size(), cfg.SizeBytes)
	}
	r := &restorer{cfg: cfg, client: client, state: RestoreState{Replica: cfg.Replica}}
	if cfg.From != nil {
		r.state = *cfg.From
		if r.state.Replica != cfg.Replica {
			return nil, fmt.Errorf("restore: begun from replica %q, not from %q: begin it anew", r.state.Replica, cfg.Replica)
		}
	}
	// Ends the stream in every case.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if !r.state.Verifying {
		if err := r.fill(ctx); err != nil {
			return nil, fmt.Errorf("restore from replica %q: %w", cfg.Replica, err)
		}
	}
	if err := r.verify(ctx); err != nil {
		return nil, fmt.Errorf("restore from replica %q: %w", cfg.Replica, err)
	}
	return r.state.Lineage.Clone(), nil
}

type restorer struct {
	cfg    RestoreConfig
	client proto.ReplicationClient
	state  RestoreState // as last saved
	saved  bool
	seen   RestoreProgress
}

func (r *restorer) save(s RestoreState) error {
	if err := r.cfg.Save(s); err != nil {
		return fmt.Errorf("save the progress: %w", err)
	}
	r.state, r.saved = s, true
	return nil
}

// open begins a stream and checks its header against what is known.
func (r *restorer) open(ctx context.Context, req *proto.RestoreRequest) (proto.Replication_RestoreClient, error) {
	req.VolumeUuid, req.Replica = r.cfg.VolumeUUID[:], r.cfg.Replica
	if len(r.state.Lineage) > 0 {
		req.Expected = r.state.Lineage.Tip().proto()
	}
	stream, err := r.client.Restore(ctx, req)
	if err != nil {
		return nil, err
	}
	m, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	h := m.GetHeader()
	if h == nil {
		return nil, errors.New("the replica's answer does not begin with a header")
	}
	if h.SizeBytes != uint64(r.cfg.SizeBytes) {
		return nil, fmt.Errorf("the replica holds a volume of %d bytes, wanted are %d", h.SizeBytes, r.cfg.SizeBytes)
	}
	l, err := LineageFromProto(h.Lineage)
	if err == nil && len(l) == 0 {
		err = errors.New("the replica names no position")
	}
	if err != nil {
		return nil, err
	}
	if len(r.state.Lineage) > 0 && l.Tip() != r.state.Lineage.Tip() {
		return nil, fmt.Errorf("the replica holds %v, the restore began with %v: begin it anew", l.Tip(), r.state.Lineage.Tip())
	}
	r.state.Lineage = l
	r.seen = RestoreProgress{TotalBytes: r.cfg.SizeBytes, DataBytes: int64(h.DataBytes)}
	return stream, nil
}

func (r *restorer) fill(ctx context.Context) error {
	stream, err := r.open(ctx, &proto.RestoreRequest{FromOffset: r.state.OffsetBytes, Codec: r.cfg.Codec.String()})
	if err != nil {
		return err
	}
	if err := r.save(r.state); err != nil {
		return err
	}
	dec, err := NewDecompressor(1)
	if err != nil {
		return err
	}
	w := newWritePipe(r.cfg.Target, 0, dec, newRunPool())
	defer w.close()
	at := int64(r.state.OffsetBytes)
	savedAt, since := at, r.cfg.Clock.Now()
	var frames uint64
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			err = errors.New("the replica ended the stream too early")
		}
		if err != nil {
			return err
		}
		if end := m.GetEnd(); end != nil {
			if at != r.cfg.SizeBytes || end.Frames != frames {
				return fmt.Errorf("%d of %d bytes and %d of %d frames came", at, r.cfg.SizeBytes, frames, end.Frames)
			}
			break
		}
		for fr := NewFrameReader(m.GetFrames().GetData()); fr.More(); frames++ {
			f, err := fr.Next()
			if err == nil && (f.Offset != at || f.Range().End() > r.cfg.SizeBytes) {
				err = fmt.Errorf("%w: %d bytes for offset %d, expected is %d", ErrBadFrame, f.Length, f.Offset, at)
			}
			if err != nil {
				return err
			}
			if err := w.put(f, nil); err != nil {
				return err
			}
			at += f.Length
		}
		if c, ok := r.client.(localClient); ok {
			c.receiver.frames.put(m.GetFrames().GetData())
		}
		r.seen.Phase, r.seen.DoneBytes = "restoring", at
		r.cfg.Progress(r.seen)
		if at-savedAt >= r.cfg.CheckpointBytes || r.cfg.Clock.Now().Sub(since) >= r.cfg.CheckpointEvery {
			if err := r.checkpoint(w, at, false); err != nil {
				return err
			}
			savedAt, since = at, r.cfg.Clock.Now()
		}
	}
	return r.checkpoint(w, at, true)
}

// checkpoint makes what was written durable, then the note of it.
func (r *restorer) checkpoint(w *writePipe, at int64, complete bool) error {
	if err := w.drain(); err != nil {
		return err
	}
	if err := r.cfg.Target.Flush(); err != nil {
		return fmt.Errorf("flush %s: %w", r.cfg.Target.Name(), err)
	}
	s := r.state
	s.OffsetBytes, s.Verifying = uint64(at), complete
	return r.save(s)
}

// verify reads back what holds data and compares checksums. Stretches that were never written were
// zeroed by the kernel, which answers for them: to read all of a sparse volume would take as long
// as to restore a full one.
func (r *restorer) verify(ctx context.Context) error {
	key := make([]byte, HashKeyBytes)
	if _, err := rand.Read(key); err != nil {
		return err
	}
	hasher, err := NewHasher(key)
	if err != nil {
		return err
	}
	stream, err := r.open(ctx, &proto.RestoreRequest{HashKey: key})
	if err != nil {
		return err
	}
	var mu sync.Mutex
	var wrong []Range
	var readErr error
	slots := make(chan struct{}, r.cfg.Readers)
	buffers := sync.Pool{New: func() any { return new([]byte) }}
	var wg sync.WaitGroup
	defer wg.Wait()
	var at int64
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			err = errors.New("the replica ended the stream too early")
		}
		if err != nil {
			return err
		}
		if m.GetEnd() != nil {
			break
		}
		s := m.GetSums()
		units := (int(s.GetLength()) + UnitSize - 1) / UnitSize
		switch {
		case s == nil, s.Length == 0, int64(s.Offset) != at, at+int64(s.Length) > r.cfg.SizeBytes,
			s.Length%BlockSize != 0, !s.Zero && (s.Length > 4<<20 || len(s.UnitHashes) != units*HashBytes):
			return fmt.Errorf("checksums for %d bytes at %d make no sense, expected is %d", s.GetLength(), s.GetOffset(), at)
		}
		at += int64(s.Length)
		if !s.Zero {
			slots <- struct{}{}
			wg.Go(func() {
				defer func() { <-slots }()
				bad, err := compareSums(r.cfg.Target, hasher, s, &buffers)
				mu.Lock()
				defer mu.Unlock()
				wrong = append(wrong, bad...)
				if err != nil && readErr == nil {
					readErr = err
				}
			})
		}
		r.seen.Phase, r.seen.DoneBytes = "verifying", at
		r.cfg.Progress(r.seen)
	}
	wg.Wait()
	switch {
	case readErr != nil:
		return readErr
	case at != r.cfg.SizeBytes:
		return fmt.Errorf("checksums for %d of %d bytes came", at, r.cfg.SizeBytes)
	case len(wrong) > 0:
		wrong = uniteRanges(wrong, nil)
		return &RestoreMismatchError{Target: r.cfg.Target.Name(), First: wrong[0], DifferentBytes: totalBytes(wrong)}
	}
	return nil
}

func compareSums(target Store, h *Hasher, s *proto.RestoreSums, buffers *sync.Pool) ([]Range, error) {
	memory := buffers.Get().(*[]byte)
	defer buffers.Put(memory)
	if cap(*memory) < int(s.Length) {
		*memory = make([]byte, s.Length)
	}
	buf := (*memory)[:s.Length]
	if _, err := target.ReadAt(buf, int64(s.Offset)); err != nil {
		return nil, fmt.Errorf("read %s back at %d: %w", target.Name(), s.Offset, err)
	}
	got := h.AppendSums(nil, buf, UnitSize)
	var out []Range
	for off := 0; off < len(buf); off += UnitSize {
		i := off / UnitSize * HashBytes
		if string(got[i:i+HashBytes]) != string(s.UnitHashes[i:i+HashBytes]) {
			out = append(out, Range{int64(s.Offset) + int64(off), int64(min(UnitSize, len(buf)-off))})
		}
	}
	return out, nil
}
