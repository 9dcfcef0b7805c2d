package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

const (
	// answerWait is how long a guest may take to boot and answer, on a busy machine.
	answerWait = 90 * time.Second
	// pulseWait is how long one may take that is well, to be told from one that hangs.
	pulseWait = 20 * time.Second
)

// Set is guests that the host tells what to do, on a network of their own. Each can
// be booted, have its power cut, be paused, and be booted again with the disks it had.
type Set struct {
	Members []*Member // as their Specs were given
	Network *Network
	cancel  context.CancelFunc
}

// Member is one guest of a Set. Its methods are for one goroutine at a time.
type Member struct {
	Name    string
	Address string
	set     *Set
	ctx     context.Context
	body    *body

	cut    context.CancelFunc // nil: it was never booted
	ended  chan struct{}      // closed when the guest has ended
	exit   int                // valid after that, as is err
	err    error
	line   *Line
	paused []int     // processes
	since  time.Time // when they had stopped
}

// WithSet has use work with guests of these Specs, of which none is booted yet, and
// removes them all, however use ends. As many as use names count towards the Host's
// limit; a larger set runs alone. If use fails since a guest hung or never booted
// (ErrNoEnd), it is called once more, with a new Set, and again says so.
func (h *Host) WithSet(ctx context.Context, specs []Spec, use func(context.Context, *Set) error) (again bool, err error) {
	if h.machine.Card == "" {
		return false, fmt.Errorf("guests %s: guests of this kind join no network", names(specs))
	}
	if os.Geteuid() != 0 {
		return false, fmt.Errorf("guests %s: a network needs root", names(specs))
	}
	long := time.Duration(0)
	for _, s := range specs {
		long = max(long, longest(s))
	}
	release, err := h.take(ctx, long, len(specs))
	if err != nil {
		return false, err
	}
	defer release()
	err = h.withSet(ctx, specs, use)
	if !errors.Is(err, ErrNoEnd) || ctx.Err() != nil {
		return false, err
	}
	return true, h.withSet(ctx, specs, use)
}

func names(specs []Spec) (names []string) {
	for _, s := range specs {
		names = append(names, s.Name)
	}
	return names
}

func (h *Host) withSet(ctx context.Context, specs []Spec, use func(context.Context, *Set) error) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	s := &Set{cancel: cancel}
	defer func() { err = errors.Join(err, s.close()) }()
	var taps []string
	for i, spec := range specs {
		b, err := h.newBody(spec)
		if err != nil {
			return err
		}
		b.tap, b.address = fmt.Sprintf("guest%d", i+1), MemberAddress(i)
		taps = append(taps, b.tap)
		s.Members = append(s.Members, &Member{Name: spec.Name, Address: b.address, set: s, ctx: ctx, body: b})
	}
	if s.Network, err = newNetwork(taps...); err != nil {
		return err
	}
	for _, m := range s.Members {
		m.body.network = s.Network
	}
	return use(ctx, s)
}

// close cuts all guests' power and removes what there was of them.
func (s *Set) close() (err error) {
	s.cancel()
	for _, m := range s.Members {
		m.Cut()
		m.body.remove()
	}
	if s.Network != nil {
		err = s.Network.Close()
	}
	return err
}

// Boot begins to boot a guest that does not run; Answers waits for it.
func (m *Member) Boot() {
	if m.runs() {
		panic("guest " + m.Name + " runs already")
	}
	var ctx context.Context
	ctx, m.cut = context.WithCancel(m.ctx)
	ended := make(chan struct{})
	m.ended = ended
	go func() {
		defer close(ended)
		m.exit, m.err = m.body.live(ctx)
	}()
}

func (m *Member) runs() bool {
	if m.ended == nil {
		return false
	}
	select {
	case <-m.ended:
		return false
	default:
		return true
	}
}

// Answers waits until the guest's program serves. ErrNoEnd: it hangs, or never booted.
func (m *Member) Answers() error {
	ctx, cancel := m.alive(answerWait)
	defer cancel()
	return m.reach(ctx)
}

// alive is a context that ends with the guest.
func (m *Member) alive(limit time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(m.ctx, limit)
	go func(ended <-chan struct{}) {
		select {
		case <-ended:
			cancel()
		case <-ctx.Done():
		}
	}(m.ended)
	return ctx, cancel
}

// reach has a line on which the guest answers.
func (m *Member) reach(ctx context.Context) error {
	for {
		line, err := dialWith(ctx, m.Address, m.set.Network.dial)
		if err != nil {
			return m.noEnd(err)
		}
		if err = line.Call(ctx, "", nil, nil); err == nil {
			m.line = line
			return nil
		}
		line.Close() // it may be about to end
	}
}

// noEnd says why a guest does not answer.
func (m *Member) noEnd(err error) error {
	if m.ctx.Err() != nil {
		return m.ctx.Err()
	}
	if m.runs() {
		return fmt.Errorf("%w (guest %s: %v)", ErrNoEnd, m.Name, err)
	}
	if m.err != nil {
		return m.err
	}
	return fmt.Errorf("guest %s: its program ended with exit status %d, and was to serve", m.Name, m.exit)
}

// Call has the guest's program do something, and waits for that; out, if set, gets what
// it says. ErrNoEnd: the guest hangs. Any other error is one of the program, one
// that does not end within the limit included.
func (m *Member) Call(limit time.Duration, do string, in, out any) error {
	if len(m.paused) > 0 || !m.runs() {
		return fmt.Errorf("guest %s can't %s: it is paused, or does not run", m.Name, do)
	}
	ctx, cancel := m.alive(limit)
	defer cancel()
	if m.line == nil {
		if err := m.reach(ctx); err != nil {
			return err
		}
	}
	err := m.line.Call(ctx, do, in, out)
	var refused errRefused
	if err == nil || errors.As(err, &refused) {
		return err
	}
	m.hangUp()
	pulse, cancel := m.alive(pulseWait)
	defer cancel()
	if err := m.reach(pulse); err != nil {
		return err
	}
	return fmt.Errorf("guest %s: %s has not ended within %v: %w", m.Name, do, limit, err)
}

func (m *Member) hangUp() {
	if m.line != nil {
		m.line.Close()
		m.line = nil
	}
}

// Wait waits until the guest has ended by itself, and returns its program's exit status.
// ErrNoEnd: it hung.
func (m *Member) Wait() (exit int, err error) {
	<-m.ended
	m.hangUp()
	return m.exit, m.err
}

// Cut ends the guest at once, paused or not. Its memory is gone, and what it held in its page
// cache; what it had written to its disks is there, also what it had not flushed.
func (m *Member) Cut() {
	if m.cut != nil {
		m.cut()
		<-m.ended
	}
	m.hangUp()
	m.paused = nil
}

// Output is what the guest has said on its console.
func (m *Member) Output() string { return m.body.console.String() }

// Unplug takes the guest off the network, for the others and for the host: it can't be
// called until Plug has put it back.
func (m *Member) Unplug() error { return m.set.Network.link(m.body.tap, "nomaster") }

// Plug ends Unplug.
func (m *Member) Plug() error { return m.set.Network.link(m.body.tap, onBridge) }

// Each does something with all of some guests at once.
func Each(members []*Member, do func(*Member) error) error {
	errs := make([]error, len(members))
	var all sync.WaitGroup
	for i, m := range members {
		all.Go(func() { errs[i] = do(m) })
	}
	all.Wait()
	return errors.Join(errs...)
}
