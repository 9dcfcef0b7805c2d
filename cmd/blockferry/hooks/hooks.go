// Package hooks runs the operator's commands when something happens to a volume,
// or is about to: docs/hooks.md is what they are promised.
package hooks

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
)

// Event is what a hook is for, and its name in the configuration.
type Event string

// The events. What runs before something may refuse it, by any exit status but 0.
const (
	FencePeer     Event = "fence-peer"     // may refuse
	UnfencePeer   Event = "unfence-peer"   // may not
	BeforePromote Event = "before-promote" // may refuse
	AfterPromote  Event = "after-promote"
	BeforeDemote  Event = "before-demote" // may refuse
	AfterDemote   Event = "after-demote"
	AfterUp       Event = "after-up"
	SplitBrain    Event = "split-brain"
	Behind        Event = "behind"
)

// Events lists all of them.
func Events() []Event {
	return []Event{FencePeer, UnfencePeer, BeforePromote, AfterPromote, BeforeDemote, AfterDemote, AfterUp, SplitBrain, Behind}
}

// Limits of how long a hook may run.
const (
	DefaultTimeout = 30 * time.Second
	MinTimeout     = time.Second
	MaxTimeout     = 10 * time.Minute
)

// Info is what a hook is told, in its environment; what is empty is left out.
type Info struct {
	Device        string   // what the application opens
	Replica       string   // by its name in the configuration
	Peer          string   // the node it is at
	Generation    string   // of the position of the copy concerned, as hexadecimal digits
	Epoch         uint64   // likewise; 0: none
	BehindSeconds *float64 // of the replica
	BehindBytes   *uint64
	Reason        string // in words, one line
}

// Runner runs the hooks of one volume. Its methods may be called by several
// goroutines at once: of each event at most one hook runs at a time.
type Runner struct {
	node, volume string
	commands     map[Event][]string
	timeout      time.Duration
	log          *slog.Logger
	turns        map[Event]chan struct{} // room for one: who has it may run

	mu     sync.Mutex
	ended  bool
	told   map[string]told // what Tell was told and nobody has run yet
	active map[string]bool // keys that a goroutine is at
	work   sync.WaitGroup
	ctx    context.Context
	cancel context.CancelFunc
}

type told struct {
	event Event
	info  Info
}

// New makes the runner of a volume; commands are of each event the program, by
// its whole path, and its arguments. node may be empty.
func New(node, volume string, commands map[Event][]string, timeout time.Duration, log *slog.Logger) *Runner {
	r := &Runner{node: node, volume: volume, commands: commands, timeout: timeout, log: log,
		turns: map[Event]chan struct{}{}, told: map[string]told{}, active: map[string]bool{}}
	if r.timeout <= 0 {
		r.timeout = DefaultTimeout
	}
	for _, e := range Events() {
		r.turns[e] = make(chan struct{}, 1)
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r
}

// Has says whether there is a hook for an event.
func (r *Runner) Has(e Event) bool { return len(r.commands[e]) > 0 }

// Run runs a hook and waits for it; without one it returns nil. An error says
// that it could not be run, that its time was over, or how it ended, with the last
// line that it wrote. When ctx ends so does the hook. It waits for its turn as long
// as a hook may take, and gives up then.
func (r *Runner) Run(ctx context.Context, e Event, info Info) error {
	return r.run(ctx, e, info, r.timeout)
}

// run waits for its turn for that long; 0: until ctx ends.
func (r *Runner) run(ctx context.Context, e Event, info Info, patience time.Duration) error {
	command := r.commands[e]
	if len(command) == 0 {
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.ctx, cancel)()
	fail := func(format string, args ...any) error {
		return fmt.Errorf("volume '%s': hook %s (%s) "+format, append([]any{r.volume, e, command[0]}, args...)...)
	}
	r.mu.Lock()
	if r.ended {
		r.mu.Unlock()
		return fail("was not run: %w", context.Canceled)
	}
	r.work.Add(1) // Close waits for it
	r.mu.Unlock()
	defer r.work.Done()
	var limit <-chan time.Time
	if patience > 0 {
		timer := time.NewTimer(patience)
		defer timer.Stop()
		limit = timer.C
	}
	turn := r.turns[e]
	select {
	case turn <- struct{}{}:
	case <-limit:
		return fail("was not run: the one before it has not ended for %v", patience)
	case <-ctx.Done():
		return fail("was not run: %w", ctx.Err())
	}
	release := func() { <-turn }
	if err := ctx.Err(); err != nil { // select may choose either
		release()
		return fail("was not run: %w", err)
	}
	log := r.log.With("hook", string(e), "replica", info.Replica)
	log.Info("hook started", "command", command[0], "reason", info.Reason)
	begun := time.Now()
	last, err := execute(ctx, command, r.environment(e, info), r.timeout, func(line string) { log.Info("hook says", "line", line) }, release)
	if err != nil {
		log.Warn("hook failed", "error", err, "seconds", time.Since(begun).Seconds())
		if last != "" {
			last = ": " + last
		}
		return fail("%w%s", err, last)
	}
	log.Info("hook ended", "seconds", time.Since(begun).Seconds())
	return nil
}

// Tell runs a hook and does not wait; that it failed is logged. While the hook of
// that event and replica runs, only the newest of what it is told meanwhile is
// kept, and run then.
func (r *Runner) Tell(e Event, info Info) {
	if !r.Has(e) {
		return
	}
	key := string(e) + " " + info.Replica
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended {
		return
	}
	r.told[key] = told{e, info}
	if r.active[key] {
		return
	}
	r.active[key] = true
	r.work.Go(func() {
		for {
			r.mu.Lock()
			next, more := r.told[key]
			delete(r.told, key)
			if !more || r.ended {
				delete(r.active, key)
				r.mu.Unlock()
				return
			}
			r.mu.Unlock()
			// What it was told is not forgotten because another replica's hook hangs.
			if err := r.run(r.ctx, next.event, next.info, 0); err != nil {
				r.log.Warn("told in vain", "hook", string(next.event), "replica", next.info.Replica, "error", err)
			}
		}
	})
}

// Close ends what runs, whoever runs it, and waits for it; nothing is run any more.
func (r *Runner) Close() {
	r.mu.Lock()
	r.ended = true
	r.mu.Unlock()
	r.cancel()
	r.work.Wait()
}

// environment is all that a hook gets.
func (r *Runner) environment(e Event, info Info) []string {
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8"}
	set := func(name, value string) {
		if value != "" {
			env = append(env, "BLOCKFERRY_"+name+"="+oneLine(value))
		}
	}
	set("EVENT", string(e))
	set("NODE", r.node)
	set("VOLUME", r.volume)
	set("DEVICE", info.Device)
	set("REPLICA", info.Replica)
	set("PEER", info.Peer)
	set("GENERATION", info.Generation)
	if info.Epoch > 0 {
		set("EPOCH", strconv.FormatUint(info.Epoch, 10))
	}
	if info.BehindSeconds != nil {
		set("BEHIND_SECONDS", strconv.FormatFloat(*info.BehindSeconds, 'f', 0, 64))
	}
	if info.BehindBytes != nil {
		set("BEHIND_BYTES", strconv.FormatUint(*info.BehindBytes, 10))
	}
	set("REASON", info.Reason)
	return env
}

// maxValue bounds what one variable holds, and what is kept of a line.
const maxValue = 1024

// oneLine keeps what another node said from being more than one line.
func oneLine(s string) string {
	if s = strings.ToValidUTF8(s, ""); len(s) > maxValue {
		s = strings.ToValidUTF8(s[:maxValue], "") // of the last one a part
	}
	return strings.Map(func(c rune) rune {
		if unicode.IsControl(c) {
			return ' '
		}
		return c
	}, s)
}
