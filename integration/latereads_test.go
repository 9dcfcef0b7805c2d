package integration

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev/dm"
)

// lateReads makes a cut's window last, in which writers are stopped, by what can happen
// to any volume: somebody reads its inner device, as udev does, and the disk is slow. A
// cut makes that device a snapshot-origin once the one above it is suspended,
// and the kernel waits for such reads first.
type lateReads struct {
	t    *testing.T
	disk string // the guest's first, with a place that is read late

	ctl   *dm.Control
	name  string
	stop  chan struct{} // nil: nothing is read
	wg    sync.WaitGroup
	errs  chan error
	close func() error
}

const (
	// latePlace is where nobody else reads: far from what is written, and none of the
	// places whose digests are kept.
	latePlace = 12 << 20
	// A read begins lateRate times while one lasts, so that whenever a window
	// opens one has just begun. They queue up while the device is suspended, and
	// there are enough readers for the next to begin on time all the same.
	lateRate    = 6
	lateReaders = 4 * lateRate
)

// newLateReads makes the disk. A volume's data area begins at 1 MiB of it.
func newLateReads(t *testing.T, name string) *lateReads {
	t.Helper()
	l := &lateReads{t: t, name: name, ctl: mapper(t)}
	l.disk = dmCreate(t, name, "0 1 error")
	l.slow(0)
	return l
}

// slow has the place read in so many ms.
func (l *lateReads) slow(ms int) {
	l.t.Helper()
	n, at, length := uint64(sectors(l.t, ubd(0))), uint64(1<<20+latePlace)/512, uint64(1<<20)/512
	table := []dm.Target{
		{Length: at, Type: "linear", Params: ubd(0) + " 0"},
		{Start: at, Length: length, Type: "delay", Params: fmt.Sprintf("%s %d %d %[1]s %[2]d 0", ubd(0), at, ms)},
		{Start: at + length, Length: n - at - length, Type: "linear", Params: fmt.Sprint(ubd(0), " ", at+length)},
	}
	// In one call: for a program to be started the disk would stand still too long.
	if err := errors.Join(l.ctl.Load(l.name, table), l.ctl.Resume(l.name)); err != nil {
		l.t.Fatal(err)
	}
}

// begin has the volume's base read at all times, each read taking so many ms. A window lasts
// nearly as long then. It ends with the test, or before by end.
func (l *lateReads) begin(ms int, base string) {
	l.t.Helper()
	l.end()
	path, err := l.ctl.OwnNode(base)
	if err != nil {
		l.t.Fatal(err)
	}
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		l.t.Fatal(err)
	}
	l.slow(ms)
	stop := make(chan struct{})
	l.stop, l.errs = stop, make(chan error, lateReaders)
	ticker := time.NewTicker(time.Duration(ms) * time.Millisecond / lateRate)
	for i := range lateReaders {
		block := alignedBuffer(4096)
		l.wg.Go(func() {
			defer unix.Munmap(block)
			for {
				select {
				case <-stop:
					return
				case <-ticker.C:
				}
				if _, err := file.ReadAt(block, latePlace+int64(i)*4096); err != nil {
					l.errs <- err
					return
				}
			}
		})
	}
	l.t.Cleanup(l.end)
	l.close = func() error { ticker.Stop(); return file.Close() }
}

// end ends them and makes the disk quick again.
func (l *lateReads) end() {
	l.t.Helper()
	if l.stop == nil {
		return
	}
	close(l.stop)
	l.stop = nil
	l.wg.Wait()
	if err := l.close(); err != nil {
		l.t.Error(err)
	}
	l.slow(0)
	select {
	case err := <-l.errs:
		l.t.Errorf("a late read: %v", err)
	default:
	}
}
