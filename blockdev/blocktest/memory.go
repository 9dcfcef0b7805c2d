// Package blocktest holds what tests of devices need: a device in memory that
// can lose power and fail, and the suite that every blockdev.Device passes.
package blocktest

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sync"

	"blockferry/blockdev"
)

// Op is a kind of operation on a device.
type Op int

// The operations of a device. A zero-out and a discard count as OpZeroOut and
// OpDiscard only, not as writes.
const (
	OpRead Op = iota
	OpWrite
	OpFlush
	OpZeroOut
	OpDiscard
	opCount
)

func (o Op) String() string {
	return [...]string{"read", "write", "flush", "zero-out", "discard"}[o]
}

// ErrPowerLost is what every operation on a Memory returns after PowerCut.
var ErrPowerLost = errors.New("power lost")

// Memory is a sparse blockdev.Device in memory with a volatile write cache:
// what was written since the last good Flush may be lost, in part, when the
// power goes. Safe for concurrent use.
type Memory struct {
	name string
	size int64

	mu    sync.Mutex
	state error // why nothing works any more: closed or without power
	// current is what reads see, durable what survives in any case, both by
	// block number. Pages are never changed once they stand in a map, so
	// views share them. An absent page is zeros.
	current, durable map[int64][]byte
	// cached is what was written and not flushed, in order. A failed flush
	// dooms what it was to make durable: no later flush does, as with disks
	// and kernels that drop their cache then.
	cached []cachedWrite
	doomed int // so many entries at the front of cached
	plans  [opCount]*failure
	counts [opCount]int
}

type failure struct {
	in  int // so many operations still succeed
	err error
}

var _ blockdev.Device = (*Memory)(nil)

// NewMemory makes a device of size bytes, a multiple of blockdev.BlockSize,
// all zeros. It takes memory only for what is written.
func NewMemory(size int64) *Memory {
	if size < 0 || size%blockdev.BlockSize != 0 {
		panic(fmt.Sprintf("blocktest: a device of %d bytes, want a multiple of %d", size, blockdev.BlockSize))
	}
	return &Memory{name: "memory", size: size, current: map[int64][]byte{}, durable: map[int64][]byte{}}
}

// Fill has every block hold the page, durably, and takes memory for one of them.
// The page must not be changed any more.
func (m *Memory) Fill(page []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for b := range m.size / blockdev.BlockSize {
		m.current[b], m.durable[b] = page, page
	}
	m.cached, m.doomed = nil, 0
}

// FailAt makes one operation of the kind fail with err: the one after k more
// have succeeded (0: the next). A failed write leaves its first half written,
// a failed flush dooms what it was to make durable. A nil err cancels.
func (m *Memory) FailAt(op Op, k int, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err == nil {
		m.plans[op] = nil
		return
	}
	m.plans[op] = &failure{k, err}
}

// FailurePending says that a failure asked for with FailAt has not happened:
// the end of a loop that fails at k = 0, 1, 2 and so on.
func (m *Memory) FailurePending(op Op) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.plans[op] != nil
}

// Count is the number of operations of the kind so far, failed ones included.
// Refused ranges are not counted.
func (m *Memory) Count(op Op) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.counts[op]
}

// PowerCut ends the device, closed or not, and returns it as it is after the
// reboot: of the writes that were not flushed each is lost, kept, or torn at
// sectors, as rng decides. The same rng state gives the same device.
func (m *Memory) PowerCut(rng *rand.Rand) *Memory {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state = ErrPowerLost
	after := maps.Clone(m.durable)
	// A cut that loses all but one of many writes, or none but one, is as
	// likely to find a bug as an even mix, so the odds are drawn too.
	keep, tear := rng.Float64()*1.5-0.25, rng.Float64()*1.5-0.25
	for _, w := range m.cached {
		switch {
		case rng.Float64() < keep:
			w.apply(after)
		case rng.Float64() < tear:
			w.applyTorn(after, rng)
		}
	}
	return &Memory{name: m.name, size: m.size, current: after, durable: maps.Clone(after)}
}

// Clone is an independent copy, write cache included, that works even when
// the original is closed or without power. Counts and failures start anew.
func (m *Memory) Clone() *Memory {
	m.mu.Lock()
	defer m.mu.Unlock()
	return &Memory{
		name: m.name, size: m.size, doomed: m.doomed, cached: slices.Clone(m.cached),
		current: maps.Clone(m.current), durable: maps.Clone(m.durable),
	}
}

// Name implements blockdev.Device.
func (m *Memory) Name() string { return m.name }

// Size implements blockdev.Device.
func (m *Memory) Size() int64 { return m.size }

// begin checks and counts an operation. With fail not nil the operation takes
// place as a failing one does, and returns fail.
func (m *Memory) begin(op Op, offset, length int64) (fail, err error) {
	if err := blockdev.CheckRange(m, op.String(), offset, length); err != nil {
		return nil, err
	}
	if m.state != nil {
		return nil, fmt.Errorf("%s: %s of %d bytes at offset %d: %w", m.name, op, length, offset, m.state)
	}
	m.counts[op]++
	plan := m.plans[op]
	if plan == nil {
		return nil, nil
	}
	if plan.in > 0 {
		plan.in--
		return nil, nil
	}
	m.plans[op] = nil
	return fmt.Errorf("%s: %s of %d bytes at offset %d: %w", m.name, op, length, offset, plan.err), nil
}

// ReadAt implements blockdev.Device.
func (m *Memory) ReadAt(p []byte, offset int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if fail, err := m.begin(OpRead, offset, int64(len(p))); err != nil || fail != nil {
		return 0, cmp.Or(err, fail)
	}
	for done := 0; done < len(p); done += blockdev.BlockSize {
		b := p[done : done+blockdev.BlockSize]
		if page := m.current[(offset+int64(done))/blockdev.BlockSize]; page != nil {
			copy(b, page)
		} else {
			clear(b)
		}
	}
	return len(p), nil
}

// WriteAt implements blockdev.Device.
func (m *Memory) WriteAt(p []byte, offset int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fail, err := m.begin(OpWrite, offset, int64(len(p)))
	if err != nil {
		return 0, err
	}
	data := slices.Clone(p)
	if fail != nil {
		half := len(p) / 2 &^ (blockdev.SectorSize - 1)
		for at := 0; at < len(p); at += blockdev.BlockSize {
			from := min(max(half, at), at+blockdev.BlockSize) // the first byte that stays as it was
			rest := data[from : at+blockdev.BlockSize]
			if page := m.current[(offset+int64(at))/blockdev.BlockSize]; page != nil {
				copy(rest, page[from-at:])
			} else {
				clear(rest)
			}
		}
	}
	m.write(cachedWrite{offset, int64(len(p)), data})
	if fail != nil {
		return 0, fail
	}
	return len(p), nil
}

// ZeroOut implements blockdev.Device.
func (m *Memory) ZeroOut(offset, length int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	fail, err := m.begin(OpZeroOut, offset, length)
	if err != nil {
		return err
	}
	if fail != nil {
		length = length / 2 &^ (blockdev.BlockSize - 1)
	}
	m.write(cachedWrite{offset, length, nil})
	return fail
}

// Discard implements blockdev.Device. What was written there reads as garbage
// afterwards.
func (m *Memory) Discard(offset, length int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	fail, err := m.begin(OpDiscard, offset, length)
	if err != nil || fail != nil {
		return cmp.Or(err, fail)
	}
	garbage := bytes.Repeat([]byte{0xd5}, blockdev.BlockSize)
	for _, b := range blocksIn(m.current, offset, length) {
		m.write(cachedWrite{b * blockdev.BlockSize, blockdev.BlockSize, garbage})
	}
	return nil
}

func (m *Memory) write(w cachedWrite) {
	w.apply(m.current)
	m.cached = append(m.cached, w)
}

// Flush implements blockdev.Device.
func (m *Memory) Flush() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	fail, err := m.begin(OpFlush, 0, 0)
	if err != nil {
		return err
	}
	if fail != nil {
		m.doomed = len(m.cached)
		return fail
	}
	lost := slices.Clone(m.cached[:m.doomed])
	for _, w := range m.cached[m.doomed:] {
		w.apply(m.durable)
		var rest []cachedWrite // what is durable now can't be undone by what was doomed before
		for _, old := range lost {
			rest = append(rest, old.without(w)...)
		}
		lost = rest
	}
	m.cached, m.doomed = lost, len(lost)
	return nil
}

// Close implements blockdev.Device. What was not flushed stays in the cache.
func (m *Memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state != nil {
		return fmt.Errorf("%s: close: %w", m.name, m.state)
	}
	m.state = os.ErrClosed
	return nil
}
