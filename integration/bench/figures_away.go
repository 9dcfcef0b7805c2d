package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/cmd/blockferry/status"
	"blockferry/integration/rig"
)

const (
	// awayRate is how many writes of 4 KiB the load makes a second.
	awayRate = 100
	awayFile = 384 << 20
)

func newRandom() *rand.Rand { return rand.New(rand.NewPCG(5, 5)) }

// resyncBytes has a peer go away for as long as a load makes some writes, and follows what
// is sent when it is back.
func resyncBytes(ctx context.Context, s *stand, m *measured) (err error) {
	if err := os.MkdirAll("/run/blockferry", 0o755); err != nil {
		return err
	}
	if err := mountFresh("ext4", s.disks[0], attachedFolder); err != nil {
		return err
	}
	path := filepath.Join(attachedFolder, "file")
	if err := filledFile(path, awayFile); err != nil {
		return err
	}
	const address = "127.0.0.1:7001"
	far := &rig.Rig{Binary: s.rig.Binary, Config: "/run/blockferry/far.yaml", Socket: "/run/blockferry/far"}
	if err := far.Configure(fmt.Sprintf("node: {name: far, listen: \"%s\"}\nvolumes:\n  data: {role: secondary, device: %s, journal: 512MiB, peers: [near]}\n", address, s.disks[1])); err != nil {
		return err
	}
	if err := s.rig.Configure(fmt.Sprintf(`node: {name: near}
volumes:
  data:
    device: %s
    mode: attach
    interval: 1s
    state-file: /run/blockferry/state
    replicas:
      far: {address: "%s", peer: far, compression: none}
`, s.disks[0], address)); err != nil {
		return err
	}
	if err := errors.Join(far.Run(ctx, "create", "data"), s.rig.Run(ctx, "attach", "data")); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, far.StopAgent()) }()
	if err := far.StartAgent(ctx, &safeBuffer{}); err != nil {
		return err
	}
	if err := s.rig.StartAgent(ctx, &s.log); err != nil {
		return err
	}
	if err := s.rig.Await(ctx, "up to date", 2*time.Minute, upToDate); err != nil {
		return err
	}
	random := newRandom()
	compared := 0
	for _, minutes := range []int{1, 10, 60} {
		writes := minutes * 60 * awayRate
		if m.Quick {
			writes /= 10
		}
		if once {
			writes = 100 * minutes
		}
		name := fmt.Sprintf("%d-min", minutes)
		ratio := row{Name: name, Unit: "bytes", What: fmt.Sprintf("bytes sent, both ways, after %d min away (%d writes), per byte of the blocks of 4 KiB that had changed", minutes, writes)}
		total := row{Name: name + "/sent", Unit: "MB", What: "bytes sent then, in all"}
		saved := row{Name: name + "/written", Unit: "bytes", What: "bytes sent then, per byte written meanwhile"}
		for range m.runs(5, 1) {
			if err := s.settle(ctx); err != nil {
				return err
			}
			if err := far.StopAgent(); err != nil {
				return err
			}
			if err := s.rig.Await(ctx, "away", time.Minute, func(v status.Volume) bool { return v.Replicas[0].Connection != "Connected" }); err != nil {
				return err
			}
			changed, err := writeSkewed(path, awayFile, writes, random)
			if err != nil {
				return err
			}
			from := s.log.Len()
			if err := far.StartAgent(ctx, &safeBuffer{}); err != nil {
				return err
			}
			if err := s.settle(ctx); err != nil {
				return err
			}
			if err := s.rig.Await(ctx, "back", 5*time.Minute, upToDate); err != nil {
				return s.withLog(err)
			}
			epochs, err := s.entries("epoch committed", from)
			if err != nil {
				return err
			}
			sent := 0.0
			for _, e := range epochs {
				sent += float64(e.Stats.Link.WireBytes + e.Stats.Link.CheckBytes)
				if e.Stats.Action != "incremental" {
					compared++
				}
			}
			if sent < float64(changed) {
				return s.withLog(fmt.Errorf("%.0f bytes were sent for %d that changed", sent, changed))
			}
			ratio.Ours, ratio.Theirs = append(ratio.Ours, sent), append(ratio.Theirs, float64(changed))
			saved.Ours, saved.Theirs = append(saved.Ours, sent), append(saved.Theirs, float64(writes)*4096)
			total.Ours = append(total.Ours, sent/1e6)
			fmt.Printf("%s: %d writes, %.1f MB changed, %.1f MB sent\n", name, writes, float64(changed)/1e6, sent/1e6)
		}
		m.add(ratio)
		m.add(total)
		m.add(saved)
	}
	m.note("epochs that were compared, as the kernel had lost events", compared)
	return nil
}

// writeSkewed makes so many writes of 4 KiB of noise, four of five to the first fifth of a
// file, and tells how many bytes of it changed.
func writeSkewed(path string, size int64, writes int, random *rand.Rand) (int64, error) {
	file, err := os.OpenFile(path, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	block, err := rig.Buffer(4096)
	if err != nil {
		return 0, err
	}
	defer unix.Munmap(block)
	noise := rand.NewChaCha8([32]byte{byte(random.Uint32()), byte(random.Uint32())})
	blocks, changed := size/4096, map[int64]bool{}
	for range writes {
		at := random.Int64N(blocks / 5)
		if random.IntN(5) == 0 {
			at = blocks/5 + random.Int64N(blocks-blocks/5)
		}
		noise.Read(block)
		if _, err := file.WriteAt(block, at*4096); err != nil {
			return 0, err
		}
		changed[at] = true
	}
	return int64(len(changed)) * 4096, file.Sync()
}
