package dm

import (
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// interruptSignal is a real-time signal nobody else here uses.
const interruptSignal = unix.Signal(50)

// Thread is an operating system thread that may be waiting in a call.
type Thread struct{ pid, tid int }

// ThisThread is the calling thread. The goroutine must be locked to it.
func ThisThread() Thread { return Thread{unix.Getpid(), unix.Gettid()} }

// Interrupt ends the wait of a Suspend on that thread, which then fails with
// EINTR. A suspend that waits for a slow disk holds up every new write, and
// nothing else can end it: the kernel lets no resume in meanwhile. It does
// nothing to a thread that is not waiting, so it may have to be repeated.
func (c *Control) Interrupt(t Thread) error { return unix.Tgkill(t.pid, t.tid, interruptSignal) }

// catchInterrupts gives the signal a handler that does nothing. The runtime's
// own asks the kernel to begin an interrupted call again, and newer kernels
// (6.1.y among them) do so with a suspend.
func (c *Control) catchInterrupts() error {
	c.signals = make(chan os.Signal, 1)
	signal.Notify(c.signals, interruptSignal)
	if err := dropRestart(interruptSignal); err != nil {
		signal.Stop(c.signals)
		return fmt.Errorf("device-mapper: handler of signal %d: %w", interruptSignal, err)
	}
	return nil
}
