package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"blockferry/blockdev"
	"blockferry/proto"
	"blockferry/protocol"
)

const streamBytes = 4 << 30

// streamVersusTCP sends what lies in memory to a replica in memory, by gRPC on
// loopback, and the same bytes over one plain connection there.
func streamVersusTCP(ctx context.Context, _ *stand, m *measured) error {
	source := &ramDisk{b: make([]byte, 256<<20)}
	noise := rand.NewChaCha8([32]byte{7})
	_, _ = noise.Read(source.b)
	for _, way := range []struct {
		name, what string
		mode       protocol.Mode
	}{
		{"in-place", "bytes per second of a first sync from memory to a replica in memory, by gRPC over TCP on loopback and with all checks, over those of one plain TCP connection", protocol.ModeInPlace},
		{"journaled", "the same through the replica's journal, applied", protocol.ModeJournal},
	} {
		f, err := newFeed(ctx, source, &ramDisk{b: make([]byte, 1<<30)}, protocol.FormatOptions{SizeBytes: source.Size(), JournalBytes: 600 << 20}, overLoopback)
		if err != nil {
			return err
		}
		rounds := int(streamBytes / source.Size())
		if m.Quick {
			rounds /= 4
		}
		busy := row{Name: way.name + "/cpus", Unit: "processors", What: fmt.Sprintf("how many of %d processors were busy with the session's two ends on average, as far as nothing else was", runtime.NumCPU())}
		cpu := row{Name: way.name + "/cpu", Unit: "s", What: "processor time of both ends, the kernel's included, over that of the plain connection's"}
		err = m.pairs(ctx, row{Name: way.name, What: way.what, Unit: "s", Inverse: true}, m.runs(5, 3),
			func(ctx context.Context) (took float64, err error) {
				before := ownCPU()
				took, err = f.send(ctx, way.mode, rounds)
				cpu.Ours = append(cpu.Ours, ownCPU()-before)
				busy.Ours = append(busy.Ours, (ownCPU()-before)/took)
				return took, err
			},
			func(context.Context) (float64, error) {
				before := ownCPU()
				took, err := plainTCP(source.b, rounds, loopback)
				cpu.Theirs = append(cpu.Theirs, ownCPU()-before)
				return took, err
			})
		f.close()
		if err != nil {
			return err
		}
		last := m.Rows[len(m.Rows)-1]
		m.add(cpu)
		m.add(busy)
		for _, side := range []struct {
			name  string
			times []float64
		}{{"ours", last.Ours}, {"plain TCP", last.Theirs}} {
			m.note(way.name+" MB/s, "+side.name, float64(int64(rounds)*source.Size())/1e6/percentile(side.times, 50))
		}
	}
	return nil
}

// ownCPU is what this process took so far, in seconds.
func ownCPU() float64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return math.NaN()
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}

// firstSyncNatively is first-sync-vs-dd without a guest: the sender's and the
// replica's side of the agent, on loop devices.
func firstSyncNatively(ctx context.Context, s *stand, m *measured) error {
	source, target := s.disks[0], s.disks[1]
	// The target's memory is there before the first pair, too.
	for _, disk := range s.disks {
		if err := fill(disk, syncBytes+64<<20, 3); err != nil {
			return err
		}
	}
	from, err := blockdev.OpenFile(source, blockdev.OpenOptions{})
	if err != nil {
		return err
	}
	defer from.Close()
	return m.pairs(ctx, row{Name: "loop-devices", Unit: "s", Inverse: true,
		What: "the rate of a first sync of 1 GiB, from Begin to its commit, over that of dd (bs=1M iflag=direct oflag=direct conv=fsync)"}, m.runs(5, 3),
		func(ctx context.Context) (float64, error) {
			to, err := blockdev.OpenFile(target, blockdev.OpenOptions{Write: true})
			if err != nil {
				return 0, err
			}
			defer to.Close()
			f, err := newFeed(ctx, section{from}, to, protocol.FormatOptions{SizeBytes: syncBytes, JournalBytes: 32 << 20}, nil)
			if err != nil {
				return 0, err
			}
			defer f.close()
			return f.send(ctx, protocol.ModeInPlace, 1)
		},
		func(ctx context.Context) (float64, error) { return dd(ctx, source, target, syncBytes) })
}

// section is the volume's part of a device.
type section struct{ blockdev.Device }

func (section) Size() int64 { return syncBytes }

// ramDisk is a device without any cost but the copying.
type ramDisk struct{ b []byte }

func (*ramDisk) Name() string  { return "memory" }
func (m *ramDisk) Size() int64 { return int64(len(m.b)) }
func (*ramDisk) Flush() error  { return nil }
func (m *ramDisk) ReadAt(p []byte, off int64) (int, error) {
	return copy(p, m.b[off:off+int64(len(p))]), nil
}
func (m *ramDisk) WriteAt(p []byte, off int64) (int, error) {
	return copy(m.b[off:off+int64(len(p))], p), nil
}
func (m *ramDisk) ZeroOut(off, n int64) error { clear(m.b[off : off+n]); return nil }

// feed is a replica and a session that feeds it.
type feed struct {
	source interface {
		io.ReaderAt
		Size() int64
	}
	replica *protocol.Replica
	link    *protocol.Link
	epoch   uint64
	closers []func()
}

var feedVolume = [16]byte{1, 2, 3}

// network has a receiver served, and gives the client that reaches it and what ends both.
type network func(*protocol.Receiver) (proto.ReplicationClient, func(), error)

// overLoopback is plain TCP on loopback.
func overLoopback(receiver *protocol.Receiver) (proto.ReplicationClient, func(), error) {
	lis, err := loopback()
	if err != nil {
		return nil, nil, err
	}
	server := grpc.NewServer(protocol.ServerOptions()...)
	proto.RegisterReplicationServer(server, receiver)
	go func() { _ = server.Serve(lis) }()
	conn, err := grpc.NewClient(lis.Addr().String(), append(protocol.DialOptions(), grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		server.Stop()
		return nil, nil, err
	}
	return proto.NewReplicationClient(conn), func() { _ = conn.Close(); server.Stop() }, nil
}

// newFeed formats the store; the session is one over a network, or, without, of this process.
func newFeed(ctx context.Context, source interface {
	io.ReaderAt
	Size() int64
}, store protocol.Store, o protocol.FormatOptions, over network) (_ *feed, err error) {
	f := &feed{source: source}
	defer func() {
		if err != nil {
			f.close()
		}
	}()
	o.VolumeUUID = feedVolume
	if err := protocol.FormatReplica(store, o); err != nil {
		return nil, err
	}
	if f.replica, err = protocol.OpenReplica(ctx, store, protocol.OpenOptions{}); err != nil {
		return nil, err
	}
	f.closers = append(f.closers, func() { _ = f.replica.Close() })
	receiver := protocol.NewReceiver(protocol.ReceiverConfig{})
	f.closers = append(f.closers, receiver.Close)
	if err := receiver.Add("bench", f.replica); err != nil {
		return nil, err
	}
	client := protocol.LocalClient(receiver)
	if over != nil {
		var end func()
		if client, end, err = over(receiver); err != nil {
			return nil, err
		}
		f.closers = append(f.closers, end)
	}
	config := protocol.LinkConfig{VolumeUUID: feedVolume, SizeBytes: source.Size(), Replica: "bench"}
	if over == nil {
		config.BatchBytes = protocol.LocalBatchBytes
	}
	if f.link, err = protocol.Connect(ctx, client, config, protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: 1}}); err != nil {
		return nil, err
	}
	f.closers = append(f.closers, f.link.Close)
	return f, nil
}

func (f *feed) close() {
	for i := len(f.closers) - 1; i >= 0; i-- {
		f.closers[i]()
	}
}

// send sends all of the source as so many epochs; in seconds until the last is
// applied. A replica that was never synced gets one in place before.
func (f *feed) send(ctx context.Context, mode protocol.Mode, epochs int) (float64, error) {
	if f.epoch == 0 && mode == protocol.ModeJournal {
		if _, err := f.send(ctx, protocol.ModeInPlace, 1); err != nil {
			return 0, err
		}
	}
	began := time.Now()
	for range epochs {
		f.epoch++
		lineage := protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: f.epoch}}
		start := protocol.EpochStart{Epoch: f.epoch, Mode: mode, Full: true, Lineage: lineage}
		if err := f.link.Begin(ctx, start, false); err != nil {
			return 0, err
		}
		whole := []protocol.Range{{Offset: 0, Length: f.source.Size()}}
		if _, err := f.link.SendRound(ctx, protocol.Round{Source: f.source, Ranges: whole}); err != nil {
			return 0, err
		}
		if err := f.link.Commit(ctx, lineage, 0); err != nil {
			return 0, err
		}
	}
	if err := f.replica.WaitApplied(ctx, f.epoch); err != nil {
		return 0, err
	}
	return time.Since(began).Seconds(), nil
}

// plainTCP sends data so often over one connection, to where listen opens a port, and
// reads it on the other side, a MiB at a time.
func plainTCP(data []byte, times int, listen func() (net.Listener, error)) (float64, error) {
	lis, err := listen()
	if err != nil {
		return 0, err
	}
	defer lis.Close()
	sent := make(chan error, 1)
	go func() {
		conn, err := net.Dial("tcp", lis.Addr().String())
		for range times {
			for at := 0; err == nil && at < len(data); at += 1 << 20 {
				_, err = conn.Write(data[at : at+1<<20])
			}
		}
		if err == nil {
			err = conn.Close()
		}
		sent <- err
	}()
	conn, err := lis.Accept()
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	began := time.Now()
	buf, got := make([]byte, 1<<20), 0
	for err == nil {
		var n int
		n, err = conn.Read(buf)
		got += n
	}
	took := time.Since(began).Seconds()
	if errors.Is(err, io.EOF) {
		err = nil
	}
	if want := times * len(data); err == nil && got != want {
		err = fmt.Errorf("%d bytes came, sent were %d", got, want)
	}
	return took, errors.Join(err, <-sent)
}
