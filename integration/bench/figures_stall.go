package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/integration/rig"
)

// FIFREEZE and FITHAW of linux/fs.h.
const (
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
)

const (
	stallWriters = 2
	stallBytes   = 64 << 20 // of each writer's file
)

// attachCutStall has writers go on while cuts and bare freezes are made in turn.
func attachCutStall(ctx context.Context, s *stand, m *measured) error {
	for _, kind := range []string{"ext4", "xfs"} {
		// Cuts are taken when one is asked for, not by themselves.
		if err := s.attach(ctx, kind, 0, time.Hour, false); err != nil {
			return fmt.Errorf("%s: %w", kind, err)
		}
		for _, direct := range []bool{true, false} {
			if err := s.stallsOf(ctx, m, kind, direct); err != nil {
				return fmt.Errorf("%s, direct %v: %w", kind, direct, err)
			}
		}
		if err := s.detach(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (s *stand) stallsOf(ctx context.Context, m *measured, kind string, direct bool) (err error) {
	name := kind + map[bool]string{true: "-direct", false: "-buffered"}[direct]
	writers, err := startGapWriters(attachedFolder, direct)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, writers.end()) }()
	dir, err := os.Open(attachedFolder)
	if err != nil {
		return err
	}
	defer dir.Close()
	own := row{Name: name + "/own-stop", Unit: "ms", What: "what the agent itself says that writers were stopped for a cut, over a bare freeze and thaw"}
	parts := []row{
		{Name: name + "/freezing", What: "of its own stop, until the file system was frozen: the kernel's own, and one answer of the dead-man"},
		{Name: name + "/inside", What: "of its own stop, until what was left was read"},
		{Name: name + "/thawing", What: "of its own stop, until it was thawed"},
	}
	gap := func(f func() error) (float64, error) {
		time.Sleep(300 * time.Millisecond) // a load like that of a moment ago
		writers.forget()
		if err := f(); err != nil {
			return 0, err
		}
		time.Sleep(100 * time.Millisecond) // until those who waited have ended
		return writers.longest()
	}
	cut := func(ctx context.Context) (float64, error) {
		from := s.log.Len()
		ms, err := gap(func() error { return s.settle(ctx) })
		if err != nil {
			return 0, err
		}
		found, err := s.entries("a cut's stop in parts", from)
		if err == nil && len(found) == 0 {
			err = s.withLog(errors.New("no cut stopped writers"))
		}
		if err != nil {
			return 0, err
		}
		// A cut that is tried again stops them more than once.
		longest := longestStop(found)
		own.Ours = append(own.Ours, longest.stopped()*1000)
		for i, seconds := range []float64{longest.Drain, longest.Inside, longest.Resume} {
			parts[i].Ours = append(parts[i].Ours, seconds*1000)
		}
		return ms, nil
	}
	bare := func(context.Context) (float64, error) {
		return gap(func() error {
			if err := unix.Syncfs(int(dir.Fd())); err != nil {
				return err
			}
			began := time.Now()
			if err := unix.IoctlSetInt(int(dir.Fd()), fiFreeze, 0); err != nil {
				return fmt.Errorf("freeze: %w", err)
			}
			if err := unix.IoctlSetInt(int(dir.Fd()), fiThaw, 0); err != nil {
				return fmt.Errorf("thaw: %w", err)
			}
			own.Theirs = append(own.Theirs, time.Since(began).Seconds()*1000)
			return nil
		})
	}
	what := map[bool]string{true: "O_DIRECT", false: "buffered"}[direct]
	r := row{Name: name, Unit: "ms", What: fmt.Sprintf("the longest gap that %d writers of 4 KiB (%s) on %s saw during a cut, over that during a bare freeze and thaw", stallWriters, what, kind)}
	if err := m.pairs(ctx, r, m.runs(25, 7), cut, bare); err != nil {
		return err
	}
	m.add(own)
	for _, part := range parts {
		part.Unit = "ms"
		m.add(part)
	}
	return nil
}

// stopped is how long writers were, of "a cut's stop in parts", in seconds.
func (e entry) stopped() float64 { return e.Drain + e.Inside + e.Resume }

func longestStop(found []entry) entry {
	return slices.MaxFunc(found, func(a, b entry) int { return cmp.Compare(a.stopped(), b.stopped()) })
}

// gapWriters write to files of their own and remember the longest that they
// waited.
type gapWriters struct {
	stop   chan struct{}
	wg     sync.WaitGroup
	gap    [stallWriters]atomic.Int64 // ns
	failed chan error
}

func startGapWriters(dir string, direct bool) (*gapWriters, error) {
	w := &gapWriters{stop: make(chan struct{}), failed: make(chan error, stallWriters)}
	for i := range stallWriters {
		path := filepath.Join(dir, fmt.Sprintf("gaps-%d", i))
		if err := filledFile(path, stallBytes); err != nil {
			return nil, errors.Join(err, w.end())
		}
		flags := os.O_WRONLY
		if direct {
			flags |= unix.O_DIRECT
		}
		file, err := os.OpenFile(path, flags, 0)
		if err != nil {
			return nil, errors.Join(err, w.end())
		}
		block, err := rig.Buffer(4096)
		if err != nil {
			return nil, errors.Join(err, file.Close(), w.end())
		}
		w.wg.Go(func() {
			defer unix.Munmap(block)
			defer file.Close()
			for last := time.Now(); ; time.Sleep(time.Millisecond) {
				select {
				case <-w.stop:
					return
				default:
				}
				block[0]++
				if _, err := file.WriteAt(block, rand.Int64N(stallBytes/4096)*4096); err != nil {
					w.failed <- err
					return
				}
				now := time.Now()
				w.gap[i].Store(max(w.gap[i].Load(), int64(now.Sub(last))))
				last = now
			}
		})
	}
	return w, nil
}

func (w *gapWriters) forget() {
	for i := range w.gap {
		w.gap[i].Store(0)
	}
}

// longest is the longest gap since forget, in ms.
func (w *gapWriters) longest() (float64, error) {
	longest := int64(0)
	for i := range w.gap {
		longest = max(longest, w.gap[i].Load())
	}
	select {
	case err := <-w.failed:
		return 0, fmt.Errorf("a writer: %w", err)
	default:
	}
	if longest == 0 {
		return 0, errors.New("nothing was written in all the time")
	}
	return float64(longest) / 1e6, nil
}

func (w *gapWriters) end() error {
	close(w.stop)
	w.wg.Wait()
	return nil
}
