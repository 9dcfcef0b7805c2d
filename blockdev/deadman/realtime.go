package deadman

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

const (
	// rtPriority is the lowest there is: any comes before what is not real-time,
	// and whoever else on the machine is real-time has a reason to be.
	rtPriority = 1
	// rtPasses bounds how often the threads are looked at; two do.
	rtPasses = 100
	taskDir  = "/proc/self/task"
)

// goRealTime has every thread of the process, those that are made later too, run
// before all that is not real-time. Threads that are real-time already, by the
// word of whoever started the process, stay as they are.
//
// A new thread has the policy of the one that makes it, so it is done once a whole
// look finds none without it. SCHED_RESET_ON_FORK would break that.
func goRealTime() error {
	for range rtPasses {
		entries, err := os.ReadDir(taskDir)
		if err != nil {
			return err
		}
		changed := false
		for _, e := range entries {
			tid, err := strconv.Atoi(e.Name())
			if err != nil {
				return fmt.Errorf("%s/%s is no thread", taskDir, e.Name())
			}
			was, err := isRealTime(tid)
			if err == nil && !was {
				changed = true
				err = unix.SchedSetAttr(tid, &unix.SchedAttr{Policy: unix.SCHED_RR, Priority: rtPriority}, 0)
			}
			if err != nil && !errors.Is(err, unix.ESRCH) { // that one has ended
				return fmt.Errorf("thread %d of the process: SCHED_RR, priority %d: %w", tid, rtPriority, err)
			}
		}
		if !changed {
			return nil
		}
	}
	return errors.New("threads without real-time priority go on coming")
}

func isRealTime(tid int) (bool, error) {
	a, err := unix.SchedGetAttr(tid, 0)
	if err != nil {
		return false, err
	}
	switch a.Policy {
	case unix.SCHED_FIFO, unix.SCHED_RR, unix.SCHED_DEADLINE:
		return true, nil
	}
	return false, nil
}

// rush is goRealTime; where that is not permitted the dead-man goes on without.
func rush(log *slog.Logger) {
	if err := goRealTime(); err != nil {
		log.Warn("the dead-man has no real-time priority: on a busy machine it may resume devices, and end writes when a lease ends, too late", "error", err,
			"advice", "have it started by its unit (systemctl enable --now blockferry-deadman), or permit it: CAP_SYS_NICE or LimitRTPRIO=1, no RestrictRealtime=, and a share of real-time in its control group (cpu.rt_runtime_us)")
	}
}
