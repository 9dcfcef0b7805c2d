package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
)

// serviceManager listens as systemd does and returns what comes next, "" when
// nothing does for a while.
func serviceManager(t *testing.T, watchdog time.Duration) func(patience time.Duration) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { socket.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", fmt.Sprint(watchdog.Microseconds()))
	t.Setenv("WATCHDOG_PID", fmt.Sprint(os.Getpid()))
	return func(patience time.Duration) string {
		buffer := make([]byte, 4096)
		if err := socket.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		n, err := socket.Read(buffer)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		return string(buffer[:n])
	}
}

// The service manager hears of start and stop, and its watchdog is fed for as
// long as the volumes answer, no longer.
func TestServiceManagerIsTold(t *testing.T) {
	next := serviceManager(t, 60*time.Millisecond)
	n := notifier{slog.New(slog.DiscardHandler)}
	n.ready()
	n.stopping()
	for _, want := range []string{"READY=1", "STOPPING=1"} {
		if got := next(5 * time.Second); got != want {
			t.Errorf("told '%s', want '%s'", got, want)
		}
	}
	var stuck atomic.Bool
	alive := func(context.Context) error {
		if stuck.Load() {
			return errors.New("stuck")
		}
		return nil
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		n.watch(ctx, alive, func() string { return "data UpToDate" })
	}()
	told := map[string]int{}
	for told["WATCHDOG=1"] < 3 {
		got := next(5 * time.Second)
		if got == "" {
			t.Fatalf("the watchdog starves: %v", told)
		}
		told[got]++
	}
	if told["STATUS=data UpToDate"] != 1 || len(told) != 2 {
		t.Errorf("told %v", told)
	}
	stuck.Store(true)
	for next(300*time.Millisecond) != "" { // what was on its way
		if told["late"]++; told["late"] > 3 {
			t.Fatal("the watchdog is fed though nothing answers")
		}
	}
	stop()
	<-ended
}
