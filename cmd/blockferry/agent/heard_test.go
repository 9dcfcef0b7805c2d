package agent

import (
	"context"
	"math/bits"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/transport"

	"blockferry/protocol"
)

// history is generation, epoch, generation, epoch...
func history(points ...uint64) (l protocol.Lineage) {
	for i := 0; i < len(points); i += 2 {
		l = append(l, protocol.Position{Generation: protocol.Generation{byte(points[i])}, Epoch: points[i+1]})
	}
	return l
}

// A disk that another node's copy left behind is not written, nor is one beside a
// primary that serves, or comes up. One that is down keeps nobody from coming up.
func TestSecondPrimaryStaysDown(t *testing.T) {
	serving, down := heard{primary: true, serving: true}, heard{primary: true}
	for name, c := range map[string]struct {
		disk, other protocol.Lineage
		h           heard
		refused     bool
	}{
		"it took over while this one began anew":       {history(1, 10, 2, 11), history(1, 10, 3, 13), serving, true},
		"the same, and it is down":                     {history(1, 10, 2, 11), history(1, 10, 3, 13), down, false},
		"the same, and it is secondary":                {history(1, 10, 2, 11), history(1, 10, 3, 13), heard{}, false},
		"it took over from what this one went on from": {history(1, 11), history(1, 10, 3, 13), down, true},
		"it went on": {history(1, 10), history(1, 10, 3, 13), heard{}, true},
		"this one took over from it, which went on":        {history(1, 10, 3, 13), history(1, 11), down, false},
		"it serves, and this one went on from what it has": {history(1, 10, 3, 13), history(1, 10), serving, true},
		"both hold the same":                               {history(1, 10), history(1, 10), serving, true},
		"neither remembers where they parted":              {history(1, 10), history(3, 13), down, true},
		"the same, and it is secondary, too":               {history(1, 10), history(3, 13), heard{}, true},
		"it says nothing of its history":                   {history(1, 10), nil, serving, false},
	} {
		h := c.h
		h.lineage = c.other
		if why := h.supersedes(c.disk, "node-b"); (why != "") != c.refused {
			t.Errorf("%s: %q", name, why)
		}
	}
}

// A node that does not answer is asked ever more rarely, and one that did soon.
func TestListenWaitsLonger(t *testing.T) {
	b := backoff{least: time.Second, most: 10 * time.Second}
	between := func(d, least, most time.Duration) {
		t.Helper()
		if d < least*3/4 || d > most*5/4 {
			t.Errorf("it waits %v, want about %v to %v", d, least, most)
		}
	}
	seen := map[time.Duration]bool{}
	for range 3 {
		for i := range 8 {
			d := b.wait(i == 0)
			want := min(time.Second<<i, 10*time.Second)
			between(d, want, want)
			seen[d] = true
		}
	}
	if len(seen) < 20 {
		t.Error("it is not spread")
	}

	path := filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var calls atomic.Int32
	called := make(chan struct{}, 1)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			calls.Add(1)
			c.Close()
			select {
			case called <- struct{}{}:
			default:
			}
		}
	}()
	s := aSwitching(t, nil, &config.Replica{Name: "far", Peer: "node-b", Address: "unix:" + path})
	s.role, s.uuid, s.agent.identity = roleSecondary, volume.UUID{7}, transport.NewIdentity("node-a", "", quiet())
	ctx, cancel := context.WithCancel(t.Context())
	ended, begun := make(chan struct{}), time.Now()
	go func() {
		defer close(ended)
		s.listen(ctx, "node-b", backoff{least: time.Millisecond, most: time.Hour})
	}()
	<-called
	time.Sleep(500 * time.Millisecond) // for what should not come
	cancel()
	<-ended
	took := time.Since(begun) // on a busy machine that is longer
	if n := int(calls.Load()); n > 2+bits.Len64(uint64(took.Milliseconds()*4/3)) {
		t.Errorf("called %d times in %v", n, took)
	}
}

// A node that was fenced is not waited for as long as others if it has been silent since before: a
// failover waits meanwhile. One that spoke a moment ago, or is known by what was written down, is.
func TestFencedAndSilentIsNotWaitedFor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", path) // it takes calls, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	const enough = 2 * askOff
	for name, c := range map[string]struct {
		off   []string
		heard *heard
		soon  bool
	}{
		"fenced, and silent":           {[]string{"node-b"}, &heard{primary: true, at: time.Now().Add(-heardFor)}, true},
		"silent":                       {nil, &heard{primary: true, at: time.Now().Add(-heardFor)}, false},
		"another one was fenced":       {[]string{"node-c"}, &heard{primary: true, at: time.Now().Add(-heardFor)}, false},
		"fenced, and heard just now":   {[]string{"node-b"}, &heard{primary: true, at: time.Now().Add(time.Minute)}, false},
		"fenced, and heard by another": {[]string{"node-b"}, &heard{primary: true, at: time.Now().Add(-heardFor), before: true}, false},
		"fenced, and never heard":      {[]string{"node-b"}, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := aSwitching(t, nil, &config.Replica{Name: "far", Peer: "node-b", Address: "unix:" + path})
			s.config.Peers, s.agent.identity = []string{"node-b"}, transport.NewIdentity("node-a", "", quiet())
			if c.heard != nil {
				s.heard["node-b"] = *c.heard
			}
			limit := askNode // longer than any machine is busy
			if !c.soon {
				limit = enough
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			begun := time.Now()
			_, silent := s.ask(ctx, volume.UUID{7}, c.off...)
			if took := time.Since(begun); silent["node-b"] == "" || c.soon && ctx.Err() != nil || !c.soon && took < askOff*3/2 {
				t.Errorf("asked for %v: %q", took, silent)
			}
		})
	}
}

// Of another secondary it is said when that one holds more.
func TestWhoIsAheadIsNamed(t *testing.T) {
	for name, c := range map[string]struct {
		mine, other protocol.Lineage
		ahead       bool
	}{
		"it has later cuts":                  {history(1, 10), history(1, 12), true},
		"it has those of a later generation": {history(1, 10), history(1, 10, 2, 12), true},
		"it is level":                        {history(1, 10), history(1, 10), false},
		"it is behind":                       {history(1, 10), history(1, 9), false},
		"it went its own way":                {history(1, 10), history(1, 9, 2, 12), false},
		"it has nothing":                     {history(1, 10), nil, false},
		"neither has anything":               {nil, history(1, 10), false},
	} {
		h := heard{lineage: c.other}
		if got := strings.Contains(h.inWords(c.mine, "node-b"), "ahead of the copy here"); got != c.ahead {
			t.Errorf("%s: %s", name, h.inWords(c.mine, "node-b"))
		}
	}
}
