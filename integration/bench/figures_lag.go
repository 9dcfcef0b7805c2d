package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"blockferry/integration/rig"
)

const (
	// lagFilePages are those of each of the load's files, 60 MiB.
	lagFilePages = 15 << 10

	lagBytes  = 384 << 20 // of the volume, and of the file system that others copy
	lagSource = "/mnt/data"
	lagTarget = "/mnt/copy"
)

// lagLoad is a load whose lag is measured, on what is replicated and on what
// others copy. Of the stand's disks the first is replicated to the second, others copy
// from the third to the second, and dd from the third to the fourth.
type lagLoad struct {
	mixed bool
	peers []lagging
	dir   string // where the replicated file system is mounted
	// end ends the replication and unmounts it.
	end func(ctx context.Context) error
}

// lagVersusLsyncd puts the load on a volume in a guest.
func lagVersusLsyncd(ctx context.Context, s *stand, m *measured) error {
	if err := s.replicated(ctx, volumeSpec{size: lagBytes}); err != nil {
		return err
	}
	if err := rig.Do("mkfs.ext4", "-q", "-F", "-b", "4096", top); err != nil {
		return err
	}
	unmount, err := mounted(map[string]string{top: lagSource})
	if err != nil {
		return err
	}
	return s.lags(ctx, m, lagLoad{mixed: true, peers: laggings, dir: lagSource, end: func(ctx context.Context) error {
		return errors.Join(unmount(), s.gone(ctx))
	}})
}

// lagNatively puts the load on an attached device.
func lagNatively(mixed bool, peers []lagging) func(context.Context, *stand, *measured) error {
	return func(ctx context.Context, s *stand, m *measured) error {
		if err := s.attach(ctx, "ext4", 0, time.Second, false); err != nil {
			return err
		}
		return s.lags(ctx, m, lagLoad{mixed: mixed, peers: peers, dir: attachedFolder, end: s.detach})
	}
}

// lags puts the same load on each, and follows how old the oldest
// write is that has not arrived.
func (s *stand) lags(ctx context.Context, m *measured, l lagLoad) error {
	n := &numbered{dir: l.dir, pages: lagFilePages, mixed: l.mixed}
	if err := n.prepare(); err != nil {
		return err
	}
	rate, err := s.sustained(ctx, m, l)
	if err != nil {
		return err
	}
	rate /= 2
	lasting := m.lasting(5*time.Minute, 20*time.Second)
	series := map[string][]float64{}

	// blockferry: what a replica has is what its last commit's cut had.
	if err := s.settle(ctx); err != nil {
		return err
	}
	from, began := s.log.Len(), time.Now()
	if err := n.write(ctx, lasting, rate); err != nil {
		return s.withLog(err)
	}
	ended := time.Now()
	if err := s.settle(ctx); err != nil {
		return err
	}
	// The agent's times are compared with ours.
	if d := ended.Round(0).Sub(began.Round(0)) - ended.Sub(began); d.Abs() > lagSampleEvery {
		return fmt.Errorf("the clock was set by %v while the load ran: measure it again", d)
	}
	commits, void, err := s.commits(from)
	if err == nil && len(commits) == 0 {
		err = errors.New("no epoch was committed in all the time")
	}
	if err != nil {
		return err
	}
	ours := lagByCuts(n.records, commits, began, ended)
	series["blockferry"] = ours.perSecond()
	count := m.runs(5, 2)
	stretch := (lasting / time.Duration(count)).Round(100 * time.Millisecond)
	whole, voided := ours.apart(count, void)
	p99 := row{Name: "blockferry", Unit: "s",
		What: fmt.Sprintf("lag p99 at interval 1s, of each %v of %v", stretch, lasting), Ours: whole}
	if len(whole) > 0 {
		m.add(p99)
	}
	if len(voided) > 0 {
		// Reported apart, with why.
		p99.Name, p99.What, p99.Ours = p99.Name+"-with-void-epochs", fmt.Sprintf("%s, of those in which an epoch was void (%d in all)", p99.What, len(void)), voided
		m.add(p99)
		m.note("void-epochs", void)
	}
	m.addLag("blockferry", "blockferry", lasting, ours)
	after := make([]float64, len(commits))
	for i, c := range commits {
		after[i] = c.committed.Sub(c.cut).Seconds()
	}
	m.add(row{Name: "blockferry-cut-to-commit", Unit: "s", What: "from a cut, writers being stopped for it included, to its commit, of each epoch", Ours: after})
	m.addLoad("blockferry", float64(n.bytes)/ended.Sub(began).Seconds(), rate)

	// All of it must be on the replica's disk, for the lag to mean anything.
	if err := l.end(ctx); err != nil {
		return err
	}
	if err := s.rig.Run(ctx, "recover", s.disks[1]); err != nil { // the last epochs may be in its journal alone
		return err
	}
	if err := arrivedAll(s.disks[1], n); err != nil {
		return fmt.Errorf("the replica: %w", err)
	}

	for _, peer := range l.peers {
		theirs, wrote, err := s.lagOf(ctx, peer, l.mixed, lasting, rate)
		if err != nil {
			return fmt.Errorf("%s: %w", peer.name, err)
		}
		series[peer.name] = theirs.perSecond()
		m.add(row{Name: peer.name, Unit: "s", What: fmt.Sprintf("lag p99 of %s, of each %v of %v, over blockferry's", peer.what, stretch, lasting),
			Ours: theirs.windows(count), Theirs: ours.windows(count)})
		m.addLag(peer.name, peer.name, lasting, theirs)
		m.addLoad(peer.name, wrote, rate)
	}
	m.note(lagSeries, series)
	return nil
}

// lagSeries is the key of the lags for the picture.
const lagSeries = "lag-per-second"

// addLag adds what the whole of a run shows.
func (m *measured) addLag(prefix, who string, lasting time.Duration, s sampled) {
	mib := make([]float64, len(s.behind))
	for i, b := range s.behind {
		mib[i] = b / (1 << 20)
	}
	for _, p := range []struct {
		name    string
		percent float64
	}{{"p50", 50}, {"p99", 99}, {"max", 100}} {
		m.add(row{Name: prefix + "-" + p.name, Unit: "s", What: fmt.Sprintf("lag %s of %s over the whole %v", p.name, who, lasting), Ours: []float64{percentile(s.lag, p.percent)}})
		m.add(row{Name: prefix + "-behind-" + p.name, Unit: "MiB", What: "bytes written from the oldest write on that had not arrived, likewise", Ours: []float64{percentile(mib, p.percent)}})
	}
}

func (m *measured) addLoad(prefix string, wrote, wanted float64) {
	m.add(row{Name: prefix + "-load", What: "bytes that were written per second then, over those wanted", Unit: "bytes/s", Ours: []float64{wrote}, Theirs: []float64{wanted}})
}

// voidEpoch is one that did not happen.
type voidEpoch struct {
	At    time.Time `json:"at"`
	Epoch uint64    `json:"epoch"`
	Why   string    `json:"why"`
}

// commits are the cuts that were committed since the log was from long, in order, and
// what was said of void ones.
func (s *stand) commits(from int) (commits []committedCut, void []voidEpoch, err error) {
	cuts := map[uint64]time.Time{}
	at := 0
	for line := range strings.Lines(s.log.since(0)) {
		at += len(line)
		var e struct {
			Time    time.Time     `json:"time"`
			Message string        `json:"msg"`
			Epoch   uint64        `json:"epoch"`
			Stalled time.Duration `json:"stalled"`
			Error   string        `json:"error"`
			Stats   struct {
				Epoch uint64 `json:"epoch"`
			} `json:"stats"`
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			continue // not all of it is there yet
		}
		switch e.Message {
		case "cut":
			// Its line is written when writers go on: what was durable before
			// they were stopped is in.
			cuts[e.Epoch] = e.Time.Add(-e.Stalled)
			continue
		}
		if at <= from {
			continue
		}
		switch e.Message {
		case "epoch committed":
			cut, known := cuts[e.Stats.Epoch]
			if !known {
				return nil, nil, fmt.Errorf("epoch %d was committed, and its cut is not in the log", e.Stats.Epoch)
			}
			commits = append(commits, committedCut{cut, e.Time})
		case "cut failed; its epoch is void", "epoch void; it is sent again":
			void = append(void, voidEpoch{e.Time, e.Epoch, e.Error})
		}
	}
	return commits, void, nil
}

// arrivedAll mounts a replica's disk and looks for every record.
func arrivedAll(device string, n *numbered) (err error) {
	unmount, err := mounted(map[string]string{device: lagTarget})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unmount()) }()
	t := target{dir: lagTarget}
	lag, _, err := t.lag(n)
	if err == nil && lag > 0 {
		err = fmt.Errorf("write %d of %d is not there", t.arrived+1, len(n.records))
	}
	return err
}

// lagPicture shows the lag of all of them over time.
func lagPicture(figure string) *picture {
	return &picture{file: figure + ".png", script: func(r report) string {
		f := r.find(figure)
		if f == nil {
			return ""
		}
		// Read back, it is what any JSON is.
		text, err := json.Marshal(f.Extra[lagSeries])
		series := map[string][]float64{}
		if err != nil || json.Unmarshal(text, &series) != nil || len(series) == 0 {
			return ""
		}
		var data, plots strings.Builder
		for i, name := range []string{"blockferry", "lsyncd", "lsyncd-tuned", "rsync-loop"} {
			if len(series[name]) == 0 {
				continue
			}
			fmt.Fprintf(&data, "$lag%d << END\n", i)
			for second, lag := range series[name] {
				fmt.Fprintf(&data, "%d %g\n", second, max(lag, 0.01))
			}
			data.WriteString("END\n")
			fmt.Fprintf(&plots, "$lag%d using 1:2 with lines lw 2 title %s, ", i, quoted(name))
		}
		return data.String() + "set logscale y\nset title 'Age of the oldest write that is not on the copy'\nset xlabel 'seconds'\nset ylabel 'lag, seconds'\nset key outside right\nplot " + plots.String() + "\n"
	}}
}
