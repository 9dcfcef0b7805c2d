package lease

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"blockferry/cmd/blockferry/lease/etcdtest"
)

const (
	data    = "07000000-0000-0000-0000-000000000000"
	testTTL = 15 * time.Second
)

var began = time.Now()

func sinceBegan() time.Duration { return time.Since(began) }

func open(t *testing.T, e *etcdtest.Etcd) *Client {
	t.Helper()
	return openWith(t, e, testTTL)
}

func openWith(t *testing.T, e *etcdtest.Etcd, ttl time.Duration) *Client {
	t.Helper()
	c, err := Open(Options{Endpoints: []string{e.Endpoint}, Prefix: "/test", TTL: ttl, Now: sinceBegan})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func within(t *testing.T, limit time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

func (c *Client) mustTake(t *testing.T, node string) *Lease {
	t.Helper()
	l, err := c.Take(within(t, time.Minute), data, Claim{Node: node, Generation: "01", Epoch: 7})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// A lease is one node's until it is given up or was not renewed for its time; a process of
// the same node takes it over by its claim; the record outlives it.
func TestLease(t *testing.T) {
	e := etcdtest.Start(t)
	a, b := open(t, e), open(t, e)
	ctx := within(t, 2*time.Minute)
	if s, err := a.Look(ctx, data); err != nil || s.Holder != nil || s.Record != nil {
		t.Fatalf("at first: %+v, %v", s, err)
	}
	before := sinceBegan()
	l := a.mustTake(t, "node-a")
	if l.Sent() < before || l.Sent() > sinceBegan() {
		t.Errorf("taken by a request of %v, not %v", l.Sent(), before)
	}
	if _, err := b.Take(ctx, data, Claim{Node: "node-b"}); !errors.Is(err, ErrHeld) || !strings.Contains(err.Error(), "node-a") {
		t.Errorf("taken twice: %v", err)
	}
	// The other volume is another's.
	if _, err := b.Take(ctx, "other", Claim{Node: "node-b"}); err != nil {
		t.Errorf("another volume: %v", err)
	}
	record := Record{Node: "node-a", Disk: &Copy{"01", 8}, Copies: map[string]Copy{"node-b": {"01", 7}}}
	before = sinceBegan()
	if err := l.Renew(ctx, &record); err != nil || l.Sent() < before {
		t.Fatalf("renewed: %v, at %v", err, l.Sent())
	}
	s, err := b.Look(ctx, data)
	if err != nil || s.Holder == nil || s.Record == nil || s.Holder.Node != "node-a" || s.Holder.Epoch != 7 || s.Record.Copies["node-b"] != (Copy{"01", 7}) || s.Record.Disk == nil || *s.Record.Disk != (Copy{"01", 8}) {
		t.Fatalf("%+v, %v", s, err)
	}
	// Another process of the node.
	again, err := open(t, e).Resume(ctx, data, *s.Holder)
	if err != nil {
		t.Fatal(err)
	}
	changed := b.Watch(ctx, data)
	<-changed // it listens
	if err := again.Release(ctx); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	case <-ctx.Done():
		t.Fatal("nobody is told that it was given up")
	}
	if err := again.Release(ctx); err != nil {
		t.Errorf("given up again: %v", err)
	}
	if err := l.Renew(ctx, nil); !errors.Is(err, ErrLost) {
		t.Errorf("renewed after it was given up: %v", err)
	}
	if s, err = a.Look(ctx, data); err != nil || s.Holder != nil || s.Record == nil || s.Record.Node != "node-a" {
		t.Errorf("after that: %+v, %v", s, err)
	}
	if _, err := a.Resume(ctx, data, Claim{Node: "node-a", Lease: int64(l.id)}); !errors.Is(err, ErrLost) {
		t.Errorf("taken over after it was given up: %v", err)
	}
	// One that is not renewed ends, and not before its time is over.
	const short = 5 * time.Second
	l = openWith(t, e, short).mustTake(t, "node-b")
	if err := l.Renew(ctx, nil); err != nil {
		t.Fatal(err)
	}
	for {
		next, err := a.Take(ctx, data, Claim{Node: "node-a"})
		if err == nil {
			if lived := next.Sent() - l.Sent(); sinceBegan()-l.Sent() < short {
				t.Errorf("another has it %v after it was renewed", lived)
			}
			break
		}
		if !errors.Is(err, ErrHeld) {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	// Who has lost it writes no record.
	if err := l.Renew(ctx, &Record{Node: "node-b"}); !errors.Is(err, ErrLost) {
		t.Errorf("renewed after it has ended: %v", err)
	}
	if s, _ := a.Look(ctx, data); s.Record.Node != "node-a" {
		t.Errorf("a lost lease wrote the record: %+v", s.Record)
	}
}

// An etcd that does not answer loses no lease: the error says that it is not known, Sent stays, and once
// it is back the lease can be renewed. A lease that an operator took away is lost.
func TestLeaseEtcdAway(t *testing.T) {
	e := etcdtest.Start(t)
	c := open(t, e)
	l := c.mustTake(t, "node-a")
	sent := l.Sent()
	resume := e.Pause(t)
	err := l.Renew(within(t, 500*time.Millisecond), &Record{Node: "node-a"})
	resume()
	if err == nil || errors.Is(err, ErrLost) || !strings.Contains(err.Error(), e.Endpoint) || l.Sent() != sent {
		t.Fatalf("etcd is stopped: %v, sent %v", err, l.Sent())
	}
	// The clock is read before the request leaves: an answer that comes late makes it live no longer.
	stops := open(t, e)
	stops.options.Now = func() time.Duration {
		resume = e.Pause(t)
		return sinceBegan()
	}
	late := Lease{client: stops, volume: data, id: l.id, sent: sent}
	err = late.Renew(within(t, 500*time.Millisecond), nil)
	resume()
	if err == nil || late.Sent() != sent {
		t.Errorf("the clock was read after the answer: %v", err)
	}
	e.Stop()
	if _, err := c.Look(within(t, 500*time.Millisecond), data); err == nil {
		t.Error("an etcd that is gone answers")
	}
	if _, err := c.Take(within(t, 500*time.Millisecond), "other", Claim{Node: "node-a"}); err == nil || errors.Is(err, ErrHeld) {
		t.Errorf("taken without etcd: %v", err)
	}
	e.Again(t)
	// It counts anew for leases that it finds.
	if err := l.Renew(within(t, time.Minute), &Record{Node: "node-a"}); err != nil || l.Sent() <= sent {
		t.Fatalf("etcd is back: %v", err)
	}
	if _, err := c.etcd.Delete(within(t, time.Minute), c.key(data, holderKey)); err != nil {
		t.Fatal(err)
	}
	sent = l.Sent()
	if err := l.Renew(within(t, time.Minute), nil); !errors.Is(err, ErrLost) || l.Sent() != sent {
		t.Errorf("its key was deleted: %v", err)
	}
}

// A process with another 'ttl' takes a lease over as it was granted, and goes on renewing it; none counts
// for longer than its own 'ttl'.
func TestLeaseResumedWithAnotherTTL(t *testing.T) {
	e := etcdtest.Start(t)
	l := open(t, e).mustTake(t, "node-a")
	if l.TTL() != testTTL {
		t.Errorf("taken for %v", l.TTL())
	}
	for ttl, counts := range map[time.Duration]time.Duration{2 * testTTL: testTTL, testTTL - time.Second: testTTL - time.Second} {
		again, err := openWith(t, e, ttl).Resume(within(t, time.Minute), data, Claim{Node: "node-a", Lease: int64(l.id)})
		if err != nil || again.TTL() != counts {
			t.Fatalf("resumed with %v: %v, for %v", ttl, err, again.TTL())
		}
		if err := again.Renew(within(t, time.Minute), nil); err != nil || again.TTL() != counts {
			t.Errorf("resumed with %v, and renewed: %v, for %v", ttl, err, again.TTL())
		}
	}
}

// What is not ours in our keys is an error that names the key, and nobody's lease.
func TestLeaseForeignValues(t *testing.T) {
	e := etcdtest.Start(t)
	c := open(t, e)
	for name, value := range map[string]string{"no JSON": "node-a", "of a later version": `{"v":2,"node":"node-a"}`, "large": `{"v":1,"node":"` + strings.Repeat("a", maxValue) + `"}`} {
		for _, key := range []string{holderKey, recordKey} {
			if _, err := c.etcd.Put(within(t, time.Minute), c.key(data, key), value); err != nil {
				t.Fatal(err)
			}
			if s, err := c.Look(within(t, time.Minute), data); err == nil || !strings.Contains(err.Error(), c.key(data, key)) {
				t.Errorf("%s: %+v, %v", name, s, err)
			}
			if key == holderKey {
				if _, err := c.Take(within(t, time.Minute), data, Claim{Node: "node-b"}); !errors.Is(err, ErrHeld) {
					t.Errorf("%s: taken: %v", name, err)
				}
			}
			if _, err := c.etcd.Delete(within(t, time.Minute), c.key(data, key)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// Of many that take it at once one has it.
func TestLeaseTakenAtOnce(t *testing.T) {
	e := etcdtest.Start(t)
	const nodes = 8
	took := make(chan error, nodes)
	for n := range nodes {
		c := open(t, e)
		go func() {
			_, err := c.Take(within(t, time.Minute), data, Claim{Node: fmt.Sprint("node-", n)})
			took <- err
		}()
	}
	have := 0
	for range nodes {
		switch err := <-took; {
		case err == nil:
			have++
		case !errors.Is(err, ErrHeld):
			t.Error(err)
		}
	}
	if have != 1 {
		t.Errorf("%d have it", have)
	}
}
