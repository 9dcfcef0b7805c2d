package agent

import (
	"context"
	"fmt"
	"strings"

	"blockferry/cmd/blockferry/config"
	"blockferry/proto"
	"blockferry/protocol"
)

// maxListed is how many places of a difference are named.
const maxListed = 5

// verify compares one replica, or all one after another.
func (m *managed) verify(ctx context.Context, replica string, send func(*proto.Progress) error) error {
	p, err := m.primary()
	if err != nil {
		return err
	}
	names := []string{replica}
	if replica == "" {
		names = nil
		for _, r := range m.config.Replicas {
			names = append(names, r.Name)
		}
	} else if _, err := m.config.Replica(replica); err != nil {
		return err
	}
	var outcome []string
	failed := false
	for _, name := range names {
		result, err := p.Verify(ctx, name, func(v protocol.VerifyProgress) {
			// A command that went away is noticed by its context.
			_ = send(&proto.Progress{Phase: "verify " + name, DoneBytes: uint64(v.DoneBytes), TotalBytes: uint64(v.TotalBytes)})
		})
		if err != nil {
			return err
		}
		if result.Same() {
			outcome = append(outcome, fmt.Sprintf("replica '%s' holds the same, %s compared", name, config.FormatSize(result.TotalBytes)))
			continue
		}
		failed = true
		m.log.Error("verify found differences", "replica", name, "bytes", result.DifferentBytes)
		m.agent.hub.publish(m.config.Name, name, "verify-differs", fmt.Sprintf("%d bytes", result.DifferentBytes))
		outcome = append(outcome, fmt.Sprintf("replica '%s' differs in %s, at %s", name, config.FormatSize(result.DifferentBytes), places(result.Differences)))
	}
	return send(&proto.Progress{Finished: true, Failed: failed, Message: m.config.Name + ": " + strings.Join(outcome, "; ")})
}

// places lists the first ranges.
func places(ranges []protocol.Range) string {
	var words []string
	for i, r := range ranges {
		if i == maxListed {
			words = append(words, "...")
			break
		}
		words = append(words, fmt.Sprintf("%d+%d", r.Offset, r.Length))
	}
	return strings.Join(words, ", ")
}
