package main

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"path/filepath"
	"time"

	"blockferry/cmd/blockferry/transport"
	"blockferry/integration/rig"
	"blockferry/integration/uml"
	"blockferry/proto"
	"blockferry/protocol"
)

// cappedRate is a link's that no processor here is the bound of: 1 Gbit/s.
const cappedRate = 125_000_000

// streamOver is what goes through a session over a link with a round trip time, with
// certificates as between nodes, against one plain TCP connection over the same link.
func streamOver(trip time.Duration) figure {
	return figure{
		name: fmt.Sprintf("stream-over-%v", trip),
		about: fmt.Sprintf("what goes through a session over a link with a round trip of %v, by mutual TLS, from a device in memory to a replica in memory, against one plain TCP connection over the same link",
			trip),
		note: "The link is a pair of TUN devices in two network namespaces; a process carries the packets, of up to 65,000 bytes, and keeps each for half of the round trip. TCP is the kernel's own, with its windows and its " +
			"congestion control. Carrying takes a good part of this machine's two processors, which both sides share with it; held to 1 Gbit/s it does not.",
		disks:   []uml.Disk{}, // all in memory
		native:  true,
		network: true,
		limit:   15 * time.Minute,
		measure: func(ctx context.Context, s *stand, m *measured) error { return measureStreamOver(ctx, s, m, trip) },
	}
}

func measureStreamOver(ctx context.Context, s *stand, m *measured, trip time.Duration) error {
	l, err := newLink(trip / 2)
	if err != nil {
		return err
	}
	measuredTrip, err := l.roundTrip(100)
	if err != nil {
		return err
	}
	m.note("round trip ms", 1e3*measuredTrip.Seconds())
	over, err := l.certified(s.rig.Binary)
	if err != nil {
		return err
	}
	source := &ramDisk{b: make([]byte, 256<<20)}
	if once {
		source.b = source.b[:16<<20]
	}
	noise := rand.NewChaCha8([32]byte{7})
	_, _ = noise.Read(source.b)
	for _, way := range []struct {
		name, what string
		mode       protocol.Mode
		rate       int64
		rounds     int // of a full run
	}{
		{"in-place", "bytes per second of a first sync by mutual TLS and with all checks, over those of one plain TCP connection on the same link", protocol.ModeInPlace, 0, 6},
		{"journaled", "the same through the replica's journal, applied", protocol.ModeJournal, 0, 6},
		{"1Gbps/in-place", "in place, the link held to 1 Gbit/s for both", protocol.ModeInPlace, cappedRate, 2},
		{"1Gbps/journaled", "through the journal, the link held to 1 Gbit/s for both", protocol.ModeJournal, cappedRate, 2},
	} {
		l.setRate(way.rate)
		f, err := newFeed(ctx, source, &ramDisk{b: make([]byte, 1<<30)}, protocol.FormatOptions{SizeBytes: source.Size(), JournalBytes: 600 << 20}, over)
		if err != nil {
			return err
		}
		rounds := way.rounds
		if m.Quick {
			rounds = 1
		}
		err = m.pairs(ctx, row{Name: way.name, What: way.what, Unit: "s", Inverse: true}, m.runs(5, 2),
			func(ctx context.Context) (float64, error) { return f.send(ctx, way.mode, rounds) },
			func(context.Context) (float64, error) { return plainTCP(source.b, rounds, l.listen) })
		f.close()
		if err != nil {
			return err
		}
		last := m.Rows[len(m.Rows)-1]
		for _, side := range []struct {
			name  string
			times []float64
		}{{"ours", last.Ours}, {"plain TCP", last.Theirs}} {
			m.note(way.name+" MB/s, "+side.name, float64(int64(rounds)*source.Size())/1e6/percentile(side.times, 50))
		}
	}
	return nil
}

// certified has sessions go over the link as between two nodes with certificates.
func (l *link) certified(binary string) (network, error) {
	const ca = "/run/ca"
	node := func(name string) (*transport.Identity, error) {
		if err := rig.Do(binary, "certs", "issue", name, "--ca", ca); err != nil {
			return nil, err
		}
		return transport.NewIdentity(name, filepath.Join(ca, "nodes", name), slog.New(slog.DiscardHandler)), nil
	}
	if err := rig.Do(binary, "certs", "init", "--ca", ca); err != nil {
		return nil, err
	}
	near, err := node("near")
	if err != nil {
		return nil, err
	}
	far, err := node("far")
	if err != nil {
		return nil, err
	}
	return func(receiver *protocol.Receiver) (proto.ReplicationClient, func(), error) {
		listener, err := l.listen()
		if err != nil {
			return nil, nil, err
		}
		server := transport.NewServer(transport.ServerOptions{Identity: far, Log: slog.New(slog.DiscardHandler), Service: receiver, Volumes: 1, Known: func(string) bool { return true }})
		go func() { _ = server.Serve(listener) }()
		return near.Client("far", listener.Addr().String()), server.Stop, nil
	}, nil
}

// loopback is where a plain connection goes that no link is measured with.
func loopback() (net.Listener, error) { return net.Listen("tcp", "127.0.0.1:0") }
