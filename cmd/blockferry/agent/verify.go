package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"blockferry/cmd/blockferry/config"
	"blockferry/proto"
	"blockferry/protocol"
)

const (
	// maxListed is how many places of a difference are named.
	maxListed = 5
	// maxLogged is how many of them are when they are about to be overwritten.
	maxLogged = 200
)

// verify compares one replica, or all one after another. With repair each gets the
// volume's content where it differs, and is compared once more.
func (m *managed) verify(ctx context.Context, replica string, repair bool, send func(*proto.Progress) error) error {
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
	var unseen error
	failed := false
	for _, name := range names {
		shown := func(v protocol.VerifyProgress) {
			// A command that went away is noticed by its context.
			_ = send(&proto.Progress{Phase: "verify " + name, DoneBytes: uint64(v.DoneBytes), TotalBytes: uint64(v.TotalBytes)})
		}
		words, good := "", false
		if repair {
			words, good, err = m.repair(ctx, p, name, shown, send)
		} else {
			var result protocol.VerifyResult
			if result, err = p.Verify(ctx, name, shown); err == nil {
				words, good = m.compared(name, result)
			}
		}
		if err != nil && (ctx.Err() != nil || len(names) == 1) {
			return err
		}
		if err != nil { // what was found at others is told all the same
			words, unseen = fmt.Sprintf("replica '%s': %v", name, err), errors.Join(unseen, err)
		} else {
			failed = failed || !good
		}
		outcome = append(outcome, words)
	}
	if unseen != nil && !failed {
		return fmt.Errorf("not every replica could be verified: %s: %w", strings.Join(outcome, "; "), unseen)
	}
	return send(&proto.Progress{Finished: true, Failed: failed, Message: m.config.Name + ": " + strings.Join(outcome, "; ")})
}

// compared is the outcome of one comparison.
func (m *managed) compared(name string, result protocol.VerifyResult) (words string, same bool) {
	if result.Same() {
		return fmt.Sprintf("replica '%s' holds the same, %s compared", name, config.FormatSize(result.TotalBytes)), true
	}
	m.differs(name, result)
	return fmt.Sprintf("replica '%s' differs in %s", name, where(result)), false
}

// differs tells log and listeners.
func (m *managed) differs(name string, result protocol.VerifyResult) {
	m.log.Error("verify found differences", "replica", name, "bytes", result.DifferentBytes, "ranges", places(result.Differences, maxLogged))
	m.agent.hub.publish(m.config.Name, name, "verify-differs", fmt.Sprintf("%d bytes", result.DifferentBytes))
}

// repair is the outcome of a comparison with the repair of what differed; good if nothing does now. What is
// about to be overwritten is told before that.
func (m *managed) repair(ctx context.Context, p *protocol.Primary, name string, shown func(protocol.VerifyProgress), send func(*proto.Progress) error) (words string, good bool, err error) {
	result, err := p.Repair(ctx, name, shown, func(found protocol.VerifyResult) {
		m.differs(name, found)
		_ = send(&proto.Progress{Message: fmt.Sprintf("%s: replica '%s' differs in %s; it gets the volume's content there", m.config.Name, name, where(found))})
	})
	switch {
	case err != nil && (result.Found.Same() || ctx.Err() != nil):
		return "", false, err
	case result.Found.Same():
		words, good = m.compared(name, result.Found)
		return words, good, nil
	case result.Epoch == 0:
		m.log.Error("repair ended", "replica", name, "error", err)
		return fmt.Sprintf("replica '%s' differs in %s, and was not repaired: %v; run it again", name, where(result.Found), err), false, nil
	}
	m.log.Warn("repaired", "replica", name, "epoch", result.Epoch, "found", result.Found.DifferentBytes, "sent", result.SentBytes, "left", result.Left.DifferentBytes, "error", err)
	m.agent.hub.publish(m.config.Name, name, "verify-repaired", fmt.Sprintf("%d bytes, epoch %d", result.SentBytes, result.Epoch))
	words = fmt.Sprintf("replica '%s' differed in %s; epoch %d brought %s of it", name, where(result.Found), result.Epoch, config.FormatSize(result.SentBytes))
	if result.SentBytes == 0 {
		words += " (when it was compared again it was the same: its disk, or a machine, reads now so, now otherwise)"
	}
	switch {
	case err != nil:
		return fmt.Sprintf("%s, but it was not compared once more: %v; run it again", words, err), false, nil
	case !result.Left.Same():
		m.differs(name, result.Left)
		return fmt.Sprintf("%s, and compared once more it differs in %s: that disk, the volume's, or a machine can't be trusted", words, where(result.Left)), false, nil
	}
	return words + ", and compared once more it holds the same", true, nil
}

// where says how much differs and where the first ranges are.
func where(r protocol.VerifyResult) string {
	return fmt.Sprintf("%s, at %s", config.FormatSize(r.DifferentBytes), places(r.Differences, maxListed))
}

// places lists the first ranges.
func places(ranges []protocol.Range, most int) string {
	var words []string
	for i, r := range ranges {
		if i == most {
			words = append(words, "...")
			break
		}
		words = append(words, fmt.Sprintf("%d+%d", r.Offset, r.Length))
	}
	return strings.Join(words, ", ")
}
