package agent

import (
	"sync"
	"time"

	"blockferry/proto"
)

// eventBuffer is how many events a slow listener may be behind before it is
// sent away.
const eventBuffer = 256

// hub hands each event to every listener. Publish never waits.
type hub struct {
	mu        sync.Mutex
	listeners map[chan *proto.Event]struct{}
	now       func() time.Time
}

func newHub() *hub {
	return &hub{listeners: map[chan *proto.Event]struct{}{}, now: time.Now}
}

// publish tells all listeners. One that does not keep up is cut off: its
// channel is closed, and it says so instead of silently missing events.
func (h *hub) publish(volume, replica, kind, message string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	e := &proto.Event{UnixNanos: h.now().UnixNano(), Volume: volume, Replica: replica, Kind: kind, Message: message}
	for l := range h.listeners {
		select {
		case l <- e:
		default:
			delete(h.listeners, l)
			close(l)
		}
	}
}

// listen returns a channel of events from now on, and how to end it.
func (h *hub) listen() (<-chan *proto.Event, func()) {
	l := make(chan *proto.Event, eventBuffer)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.listeners[l] = struct{}{}
	return l, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.listeners, l)
	}
}
