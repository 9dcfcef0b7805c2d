package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/cmd/blockferry/status"
	"blockferry/integration/rig"
	"blockferry/protocol"
)

const (
	roleBytes        = 128 << 20
	pendingBytes     = 256 << 20 // what waits in a journal
	pendingRoleBytes = 384 << 20 // the volume then
	pendingTries     = 5         // for the moment between commit and apply to be met
)

// errApplied says that the copy was not stopped in time.
var errApplied = errors.New("the copy has applied its journal")

// bothRoles are two nodes with one volume, which either can write, in one guest.
type bothRoles struct {
	s     *stand
	nodes [2]*rig.Rig
	yaml  [2]string // with ROLE
}

// newBothRoles makes them; options are further lines about the volume.
func newBothRoles(ctx context.Context, s *stand, size int64, options string) (*bothRoles, error) {
	b := &bothRoles{s: s}
	for i, name := range []string{"node-a", "node-b"} {
		other, role := []string{"node-b", "node-a"}[i], []string{"primary", "secondary"}[i]
		b.nodes[i] = &rig.Rig{Binary: s.rig.Binary, Config: "/run/blockferry/" + name + ".yaml", Socket: "/run/blockferry/" + name, Verbose: true}
		b.yaml[i] = fmt.Sprintf(`node: {name: %s, listen: "127.0.0.1:%d"}
volumes:
  data:
    role: %%s
    device: %s
    size: %d
    interval: 1s
    peers: [%s]
%[7]s    replicas:
      other: {address: "127.0.0.1:%[6]d", peer: %[5]s}
`, name, 7001+i, []string{ssdDisk, ebsDisk}[i], size, other, 7002-i, options)
		if err := b.nodes[i].Configure(fmt.Sprintf(b.yaml[i], role)); err != nil {
			return nil, err
		}
		if err := b.nodes[i].Run(ctx, "create", "--discard-my-data", "data"); err != nil {
			return nil, err
		}
	}
	for _, node := range []*rig.Rig{b.nodes[1], b.nodes[0]} {
		if err := node.StartAgent(ctx, &s.log); err != nil {
			return nil, err
		}
	}
	return b, b.nodes[0].Await(ctx, "up to date", 2*time.Minute, upToDate)
}

// takeOver has a node become primary, and tells after how many seconds the volume took its
// first write, and the command had ended.
func (b *bothRoles) takeOver(ctx context.Context, node *rig.Rig, flags ...string) (written, answered float64, err error) {
	began := time.Now()
	done := make(chan error, 1)
	go func() {
		err := node.Run(ctx, append([]string{"primary", "data"}, flags...)...)
		answered = time.Since(began).Seconds()
		done <- err
	}()
	written, err = firstWrite(top, began, time.Minute)
	return written, answered, errors.Join(<-done, err)
}

// firstWrite tells how long after began a device is there and a write to it is accepted.
func firstWrite(device string, began time.Time, limit time.Duration) (float64, error) {
	block, err := rig.Buffer(4096)
	if err != nil {
		return 0, err
	}
	defer unix.Munmap(block)
	for {
		file, err := os.OpenFile(device, os.O_WRONLY|unix.O_DIRECT, 0)
		if err == nil {
			_, err = file.WriteAt(block, 0)
			err = errors.Join(err, file.Close())
		}
		if err == nil {
			return time.Since(began).Seconds(), nil
		}
		if time.Since(began) > limit {
			return 0, fmt.Errorf("%s takes no write within %v: %w", device, limit, err)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// primaryToFirstWrite changes roles as planned, and after the loss of the primary.
func primaryToFirstWrite(ctx context.Context, s *stand, m *measured) error {
	if err := plainRoles(ctx, s, m); err != nil {
		return err
	}
	return pendingRoles(ctx, s, m)
}

// stop ends the agents and takes away what is up.
func (b *bothRoles) stop() error {
	var err error
	for _, node := range b.nodes {
		err = errors.Join(err, node.StopAgent())
	}
	return errors.Join(err, removeStack("data"))
}

func plainRoles(ctx context.Context, s *stand, m *measured) (err error) {
	b, err := newBothRoles(ctx, s, roleBytes, "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.stop()) }()
	now, then := 0, 1
	random := newRandom()
	// load leaves something to send.
	load := func() error { return overwrite(top, roleBytes, 256, random) }
	for _, way := range []struct {
		name, what string
		hand       func() error
		flags      []string
		again      func() error
	}{
		{"planned", "after the primary stood down", func() error { return b.nodes[now].Run(ctx, "secondary", "data") }, nil, func() error { return nil }},
		{"forced", "after the primary's agent was killed and its devices taken away, with --force,", func() error {
			b.nodes[now].KillAgent()
			return removeStack("data")
		}, []string{"--force"}, func() error {
			// The lost node comes back with nothing.
			if err := b.nodes[now].Configure(fmt.Sprintf(b.yaml[now], "secondary")); err != nil {
				return err
			}
			if err := b.nodes[now].Run(ctx, "create", "--discard-my-data", "data"); err != nil {
				return err
			}
			return b.nodes[now].StartAgent(ctx, &s.log)
		}},
	} {
		first := row{Name: way.name, Unit: "s", What: "from the command 'primary', " + way.what + " until the volume took a write of 4 KiB"}
		answer := row{Name: way.name + "/answered", Unit: "s", What: "the same, until the command had ended"}
		for range m.runs(9, 2) {
			if err := load(); err != nil {
				return err
			}
			if err := b.nodes[now].Run(ctx, "sync", "--wait", "--timeout", "2m", "data"); err != nil {
				return err
			}
			if err := load(); err != nil {
				return err
			}
			if err := way.hand(); err != nil {
				return err
			}
			if err := b.nodes[then].Await(ctx, "not fed", time.Minute, func(v status.Volume) bool { return v.FedBy == "" }); err != nil {
				return err
			}
			written, answered, err := b.takeOver(ctx, b.nodes[then], way.flags...)
			if err != nil {
				return err
			}
			fmt.Printf("%s: %s s\n", way.name, short(written))
			first.Ours, answer.Ours = append(first.Ours, written), append(answer.Ours, answered)
			if err := way.again(); err != nil {
				return err
			}
			now, then = then, now
			if err := b.nodes[now].Await(ctx, "up to date", 2*time.Minute, upToDate); err != nil {
				return err
			}
		}
		m.add(first)
		m.add(answer)
	}
	return b.nodes[now].Run(ctx, "down", "data")
}

// pendingRoles has the primary lost at the moment at which the other node has committed
// pendingBytes and applied nothing of it: that node's agent is stopped when its superblock
// names the epoch, and goes on when 'primary' is called.
func pendingRoles(ctx context.Context, s *stand, m *measured) error {
	first := row{Name: "forced/pending", Unit: "s",
		What: "the same as forced, with 256 MiB that were committed at the copy, and not applied, when the command was called"}
	left := row{Name: "forced/pending/journal", Unit: "MiB", What: "what lay in the copy's journal at that moment, its frames' headers included"}
	disk := row{Name: "forced/pending/disk", Unit: "s", What: "for comparison: 256 MiB read from one place of the copy's disk, written to another and flushed, 1 MiB at a time"}
	for n := range m.runs(5, 1) {
		// Other bytes each time: the disk still has those of the run before, and what is
		// equal is not sent.
		seed := uint64(n * pendingTries)
		written, journal, err := pendingOnce(ctx, s, seed)
		for tries := 1; errors.Is(err, errApplied) && tries < pendingTries; tries++ {
			written, journal, err = pendingOnce(ctx, s, seed+uint64(tries))
		}
		if err != nil {
			return err
		}
		bare, err := copyWithin(ebsDisk, pendingBytes)
		if err != nil {
			return err
		}
		fmt.Printf("forced with %s MiB pending: %s s; the disk alone: %s s\n", short(journal), short(written), short(bare))
		first.Ours, left.Ours, disk.Ours = append(first.Ours, written), append(left.Ours, journal), append(disk.Ours, bare)
	}
	m.add(first)
	m.add(left)
	m.add(disk)
	return nil
}

func pendingOnce(ctx context.Context, s *stand, seed uint64) (written, journal float64, err error) {
	b, err := newBothRoles(ctx, s, pendingRoleBytes, "    journal: 320MiB\n    cow: 64MiB\n")
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, b.stop()) }()
	a, copyAt := b.nodes[0], b.nodes[1]
	before, err := peek(ebsDisk)
	if err != nil {
		return 0, 0, err
	}
	if err := a.Run(ctx, "pause", "data"); err != nil {
		return 0, 0, err
	}
	if err := fill(top, pendingBytes, 100+seed); err != nil {
		return 0, 0, err
	}
	if err := a.Run(ctx, "resume", "data"); err != nil {
		return 0, 0, err
	}
	for st := before; st.Committed == before.Committed || st.JournalUsedBytes < pendingBytes; time.Sleep(time.Millisecond) {
		if st, err = peek(ebsDisk); err != nil {
			return 0, 0, err
		}
		if st.Applied != before.Applied {
			return 0, 0, fmt.Errorf("%w: %v; %d bytes were to be pending then: %+v", errApplied, st.Applied, pendingBytes, st)
		}
	}
	if err := unix.Kill(copyAt.AgentPid(), unix.SIGSTOP); err != nil {
		return 0, 0, err
	}
	goOn := func() error { return unix.Kill(copyAt.AgentPid(), unix.SIGCONT) }
	defer func() { _ = goOn() }() // it must not be left stopped
	a.KillAgent()
	if err := removeStack("data"); err != nil {
		return 0, 0, err
	}
	st, err := peek(ebsDisk)
	if err != nil {
		return 0, 0, err
	}
	if st.Applied != before.Applied || st.Committed == before.Committed {
		return 0, 0, fmt.Errorf("%w: %v, after it had gone from %v to %v: nothing is pending", errApplied, st.Applied, before.Committed, st.Committed)
	}
	if err := goOn(); err != nil {
		return 0, 0, err
	}
	written, _, err = b.takeOver(ctx, copyAt, "--force")
	return written, float64(st.JournalUsedBytes) / (1 << 20), err
}

// peek reads a replica's superblock.
func peek(device string) (protocol.ReplicaStatus, error) {
	disk, err := blockdev.OpenFile(device, blockdev.OpenOptions{})
	if err != nil {
		return protocol.ReplicaStatus{}, err
	}
	defer disk.Close()
	return protocol.PeekReplica(disk)
}

// copyWithin tells after how many seconds a device's beginning is also behind itself.
func copyWithin(device string, size int64) (float64, error) {
	file, err := os.OpenFile(device, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	block, err := rig.Buffer(1 << 20)
	if err != nil {
		return 0, err
	}
	defer unix.Munmap(block)
	began := time.Now()
	for at := int64(0); at < size; at += int64(len(block)) {
		if _, err := file.ReadAt(block, at); err != nil {
			return 0, err
		}
		if _, err := file.WriteAt(block, size+at); err != nil {
			return 0, err
		}
	}
	err = file.Sync()
	return time.Since(began).Seconds(), err
}

// removeStack takes away what a machine that lost its power has no more.
func removeStack(name string) error {
	// Inner devices need not have a name in /dev.
	there, err := here("dmsetup", "info", "-c", "--noheadings", "-o", "name")
	if err != nil {
		return err
	}
	for _, inner := range []string{"", "-era", "-snap", "-base", "-cow", "-meta", "-data"} {
		if !slices.Contains(strings.Fields(there), name+inner) {
			continue
		}
		if err := errors.Join(rig.Do("dmsetup", "resume", name+inner), rig.Do("dmsetup", "remove", "--retry", name+inner)); err != nil {
			return err
		}
	}
	return nil
}
