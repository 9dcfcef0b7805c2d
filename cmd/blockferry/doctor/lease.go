package doctor

import (
	"context"
	"strings"
	"time"

	"blockferry/blockdev/deadman"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/lease"
)

// etcdPatience is how long etcd has for an answer.
const etcdPatience = 2 * time.Second

// Lease asks etcd whether it is there, if a volume needs it.
func Lease(c *config.Config) Findings {
	var f Findings
	l := c.Lease
	if l == nil {
		return nil
	}
	subject := "lease: etcd at " + strings.Join(l.Endpoints, ", ")
	client, err := lease.Open(lease.Options{Endpoints: l.Endpoints, CA: l.CA, Cert: l.Cert, Key: l.Key, Prefix: l.Prefix, TTL: l.TTL, Now: deadman.BootTime})
	if err != nil {
		f.refuse(exit.Prerequisite, subject, err.Error(), "see 'ca', 'cert' and 'key' under 'lease'")
		return f
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), etcdPatience)
	defer cancel()
	if _, err := client.Look(ctx, "check"); err != nil {
		f.note(subject, "it does not answer: "+err.Error(), "until it does no volume with 'promote: auto' comes up; see 'endpoints' and certificates under 'lease', and whether etcd has a leader")
		return f
	}
	f.good(subject, "it answers, under %s", l.Prefix)
	return f
}
