package protocol

import (
	"errors"
	"testing"
	"time"

	"blockferry/proto"
)

// connect waits until the session before has ended.
func (n *node) connect(primary Lineage) *Link {
	n.t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		link, err := Connect(n.t.Context(), n.client(), LinkConfig{VolumeUUID: testUUID, SizeBytes: n.rep.Status().SizeBytes, Replica: n.name}, primary)
		var refused *RefusedError
		if err == nil {
			n.t.Cleanup(link.Close)
			return link
		}
		if !errors.As(err, &refused) || refused.Reason != proto.Reason_REASON_BUSY || time.Now().After(end) {
			n.t.Fatal(err)
		}
	}
}

// Over a link that breaks again and again, long before what is missing has
// passed, a first sync and a large epoch end all the same, and little is sent twice.
func TestResumeOverBreakingLink(t *testing.T) {
	const size, every = 48 << 20, 8 << 20
	for _, test := range []struct {
		name    string
		prepare func(src *memSource, r *rig)
		resumed int // lost sessions that it goes across
	}{
		{"first sync", nil, 4},
		{"journal", func(src *memSource, r *rig) {
			r.sync()
			wroteSome(src, 0, size/BlockSize)
		}, 4},
		{"compare", func(src *memSource, r *rig) {
			r.sync()
			wroteSome(src, 0, size/BlockSize)
			src.mu.Lock()
			src.lostBefore = src.cut + 1
			src.mu.Unlock()
		}, 4},
	} {
		t.Run(test.name, func(t *testing.T) {
			src := newMemSource(size, 64<<10)
			wroteSome(src, 0, size/BlockSize)
			n := newNode(t, "peer", size, 64<<20)
			n.recv.cfg.WindowBytes = MaxFramesBytes
			r := startRig(t, src, &memState{}, []*node{n}, func(c *PrimaryConfig) {
				c.Replicas[0].Link.Codec, c.Replicas[0].Link.BatchBytes = CodecNone, 1<<20
				c.Interval = time.Hour // no cut but those that are asked for
				if test.prepare == nil {
					n.every = every
				}
			})
			if test.prepare != nil {
				test.prepare(src, r)
				n.cutWires()
				n.mu.Lock()
				n.every, n.bytes = every, 0
				n.mu.Unlock()
			}
			epoch := r.sync()
			if e := n.check(src); e < epoch {
				t.Errorf("it holds epoch %d, want %d", e, epoch)
			}
			last := r.last("peer")
			n.mu.Lock()
			defer n.mu.Unlock()
			sent := float64(n.bytes) / size
			t.Logf("%d cuts, %.2f times what changed crossed the link; %+v", n.cuts, sent, last)
			if last.Resumed < test.resumed || sent > 1.3 || sent < 0.8 {
				t.Errorf("the epoch went across %d lost sessions, want %d or more, and sent %.2f times what changed, want 0.8 to 1.3", last.Resumed, test.resumed, sent)
			}
		})
	}
}
