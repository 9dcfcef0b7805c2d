package agent

import (
	"context"
	"log/slog"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// notifier talks to the service manager; without one it does nothing.
type notifier struct{ log *slog.Logger }

func (n notifier) send(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		n.log.Warn("the service manager was not told", "state", state, "error", err)
	}
}

func (n notifier) ready()                { n.send(daemon.SdNotifyReady) }
func (n notifier) stopping()             { n.send(daemon.SdNotifyStopping) }
func (n notifier) status(summary string) { n.send("STATUS=" + summary) }

// watch tells the service manager that the agent is alive, for as long as
// alive says so: a deadlock in what alive asks ends in a restart.
func (n notifier) watch(ctx context.Context, alive func(context.Context) error, summary func() string) {
	every, err := daemon.SdWatchdogEnabled(false)
	beat := every / 3
	if err != nil || every == 0 {
		beat = 5 * time.Second
	}
	tick := time.NewTicker(beat)
	defer tick.Stop()
	last := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		limited, cancel := context.WithTimeout(ctx, beat)
		err := alive(limited)
		cancel()
		if err != nil {
			n.log.Warn("not alive, the watchdog is not fed", "error", err)
			continue
		}
		if every > 0 {
			n.send(daemon.SdNotifyWatchdog)
		}
		if s := summary(); s != last {
			last = s
			n.status(s)
		}
	}
}
