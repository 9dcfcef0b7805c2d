package protocol

import (
	"context"
	"sync"
	"time"
)

// Pace keeps what is sent to one replica below a rate. It outlives the
// sessions, so that a link that breaks again and again is given no more. Its
// methods may be called by several goroutines at once.
//
// It is a bucket of paceBurst that may be overdrawn by one message: whoever finds
// it not empty sends, and what that took is waited for by the next.
type Pace struct {
	rate  func() int64
	clock Clock

	mu      sync.Mutex
	room    float64   // bytes that may leave at once; below 0: to be waited for
	at      time.Time // room's
	waiting int
	ended   time.Time // when the last wait did
}

const (
	// paceBurst is what may leave at once after a pause, as time at the rate.
	paceBurst = 100 * time.Millisecond
	// paceLook is how soon a change of the rate is noticed.
	paceLook = time.Second
	// paceFresh is for how long after a wait the limit counts as what holds a
	// replica back: between two waits a message is made and sent.
	paceFresh = time.Second
)

// NewPace asks rate for each message how many bytes may be sent a second just
// then, 0: as many as the link takes. A nil clock is the real one.
func NewPace(rate func() int64, clock Clock) *Pace {
	if clock == nil {
		clock = realClock{}
	}
	return &Pace{rate: rate, clock: clock, at: clock.Now()}
}

// Rate is the limit in force, in bytes per second, 0: none. Of a nil Pace it is 0.
func (p *Pace) Rate() int64 {
	if p == nil {
		return 0
	}
	return max(0, p.rate())
}

// Holding says that something waits to be sent just because of the limit, or did
// a moment ago.
func (p *Pace) Holding() bool {
	if p == nil {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.waiting > 0 || !p.ended.IsZero() && p.clock.Now().Sub(p.ended) < paceFresh
}

// take waits until n bytes may be sent, and counts them.
func (p *Pace) take(ctx context.Context, n int) error {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	waited := false
	for {
		rate := p.Rate()
		if rate == 0 {
			p.room = 0
		} else {
			now := p.clock.Now()
			p.room = min(p.room+now.Sub(p.at).Seconds()*float64(rate), paceBurst.Seconds()*float64(rate))
			p.at = now
		}
		if rate == 0 || p.room >= 0 {
			p.room -= float64(n)
			if waited {
				p.ended = p.at
			}
			return nil
		}
		pause := min(paceLook, time.Duration(-p.room/float64(rate)*float64(time.Second))+time.Millisecond)
		waited = true
		p.waiting++
		p.mu.Unlock()
		var err error
		select {
		case <-p.clock.After(pause):
		case <-ctx.Done():
			err = ctx.Err()
		}
		p.mu.Lock()
		p.waiting--
		if err != nil {
			return err
		}
	}
}
