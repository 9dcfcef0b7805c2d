package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/cmd/blockferry/status"
	"blockferry/integration/rig"
)

const roleBytes = 128 << 20

// bothRoles are two nodes with one volume, which either can write, in one guest.
type bothRoles struct {
	s     *stand
	nodes [2]*rig.Rig
	yaml  [2]string // with ROLE
}

func newBothRoles(ctx context.Context, s *stand) (*bothRoles, error) {
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
    replicas:
      other: {address: "127.0.0.1:%d", peer: %[5]s}
`, name, 7001+i, []string{ssdDisk, ebsDisk}[i], roleBytes, other, 7002-i)
		if err := b.nodes[i].Configure(fmt.Sprintf(b.yaml[i], role)); err != nil {
			return nil, err
		}
		if err := b.nodes[i].Run(ctx, "create", "data"); err != nil {
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
func primaryToFirstWrite(ctx context.Context, s *stand, m *measured) (err error) {
	b, err := newBothRoles(ctx, s)
	if err != nil {
		return err
	}
	defer func() {
		for _, node := range b.nodes {
			err = errors.Join(err, node.StopAgent())
		}
	}()
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

// removeStack takes away what a machine that lost its power has no more.
func removeStack(name string) error {
	for _, inner := range []string{"", "-era", "-snap", "-base", "-cow", "-meta", "-data"} {
		if _, err := os.Stat("/dev/mapper/" + name + inner); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := errors.Join(rig.Do("dmsetup", "resume", name+inner), rig.Do("dmsetup", "remove", "--retry", name+inner)); err != nil {
			return err
		}
	}
	return nil
}
