package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/integration/rig"
)

const (
	// lagFilePages are those of each of the load's files, 80 MiB.
	lagFilePages = 20 << 10

	lagBytes  = 384 << 20 // of the volume, and of the file system that others copy
	lagSource = "/mnt/data"
	lagTarget = "/mnt/copy"
	// spareDisk is only copied to, by dd.
	spareDisk = "/dev/ubdd"
)

// lagging is one way to keep a copy of what is written all the time.
type lagging struct {
	name, what string
	// start begins to copy lagSource to lagTarget, which holds all of it already; the
	// error says why the copying failed meanwhile.
	start func(ctx context.Context) (stop func() error, err error)
}

var laggings = []lagging{
	{"lsyncd", "lsyncd with its defaults (rsync, delay 15 s)", func(ctx context.Context) (func() error, error) {
		return lsyncd(fmt.Sprintf("sync{default.rsync, source=%q, target=%q}", lagSource, lagTarget))
	}},
	{"lsyncd-tuned", "lsyncd with delay = 1 and rsync's inplace", func(ctx context.Context) (func() error, error) {
		return lsyncd(fmt.Sprintf("sync{default.rsync, source=%q, target=%q, delay=1, rsync={inplace=true}}", lagSource, lagTarget))
	}},
	{"rsync-loop", "rsync -a --inplace, again as soon as it is done, but not more than once a second", rsyncLoop},
}

// lagVersusLsyncd puts the same load on each, and follows how old the oldest
// write is that has not arrived.
func lagVersusLsyncd(ctx context.Context, s *stand, m *measured) error {
	if err := s.replicated(ctx, volumeSpec{size: lagBytes}); err != nil {
		return err
	}
	if err := rig.Do("mkfs.ext4", "-q", "-F", top); err != nil {
		return err
	}
	unmount, err := mounted(map[string]string{top: lagSource})
	if err != nil {
		return err
	}
	defer func() {
		if unmount != nil {
			unmount()
		}
	}()
	n := &numbered{dir: lagSource, pages: lagFilePages}
	if err := n.prepare(); err != nil {
		return err
	}
	rate, err := s.sustained(ctx, m)
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
	p99 := row{Name: "blockferry", Unit: "s", Goal: atMost(2),
		What: fmt.Sprintf("lag p99 at interval 1s, of each %v of %v", stretch, lasting), Ours: ours.windows(count)}
	switch {
	case len(void) > 0:
		// Reported apart, with why.
		p99.Name, p99.What = "blockferry-with-void-epochs", fmt.Sprintf("%s, in which %d epochs were void", p99.What, len(void))
		m.note("void-epochs", void)
	}
	m.add(p99)
	m.add(row{Name: "blockferry-whole", Unit: "s", Goal: atMost(2), What: fmt.Sprintf("lag p99 over the whole %v", lasting), Ours: []float64{percentile(ours.lag, 99)}})
	m.add(row{Name: "blockferry-load", What: "bytes that were written per second then, over those wanted", Unit: "bytes/s",
		Ours: []float64{float64(n.bytes) / ended.Sub(began).Seconds()}, Theirs: []float64{rate}})

	// All of it must be on the replica's disk, for the lag to mean anything.
	err = unmount()
	unmount = nil
	if err != nil {
		return err
	}
	if err := s.gone(ctx); err != nil {
		return err
	}
	if err := arrivedAll(ebsDisk, n); err != nil {
		return fmt.Errorf("the replica: %w", err)
	}

	for _, l := range laggings {
		theirs, wrote, err := lagOf(ctx, l, lasting, rate)
		if err != nil {
			return fmt.Errorf("%s: %w", l.name, err)
		}
		series[l.name] = theirs.perSecond()
		m.add(row{Name: l.name, Unit: "s", What: fmt.Sprintf("lag p99 of %s, of each %v of %v, over blockferry's", l.what, stretch, lasting),
			Ours: theirs.windows(count), Theirs: ours.windows(count)})
		m.add(row{Name: l.name + "-whole", Unit: "s", What: fmt.Sprintf("lag p99 of %s over the whole %v", l.what, lasting), Ours: []float64{percentile(theirs.lag, 99)}})
		m.add(row{Name: l.name + "-load", What: "bytes that were written per second then, over those wanted", Unit: "bytes/s",
			Ours: []float64{wrote}, Theirs: []float64{rate}})
	}
	m.note("lag-per-second", series)
	return nil
}

// sustained measures what the way through the journal takes in the long run,
// in bytes per second, beside dd.
func (s *stand) sustained(ctx context.Context, m *measured) (float64, error) {
	lasting := m.lasting(10*time.Second, 5*time.Second)
	r := row{Name: "sustained", Unit: "bytes/s", What: fmt.Sprintf("bytes per second committed while the load runs as fast as it goes for %v, until all of it is committed, over dd between two of these disks", lasting)}
	if err := fill(rawDisk, lagBytes, 1); err != nil {
		return 0, err
	}
	err := m.pairs(ctx, r, m.runs(5, 2), func(ctx context.Context) (float64, error) {
		if err := s.settle(ctx); err != nil {
			return 0, err
		}
		from, began := s.log.Len(), time.Now()
		n := &numbered{dir: lagSource, pages: lagFilePages}
		if err := n.write(ctx, lasting, 0); err != nil {
			return 0, s.withLog(err)
		}
		if err := s.settle(ctx); err != nil {
			return 0, err
		}
		took := time.Since(began).Seconds()
		committed := uint64(0)
		found, err := s.entries("epoch committed", from)
		for _, e := range found {
			committed += e.Stats.Link.SentBytes
		}
		return float64(committed) / took, err
	}, func(ctx context.Context) (float64, error) {
		took, err := dd(ctx, rawDisk, spareDisk, lagBytes)
		return lagBytes / took, err
	})
	if err != nil {
		return 0, err
	}
	return percentile(m.Rows[len(m.Rows)-1].Ours, 50), nil
}

// commits are the cuts that were committed since the log was from long, in order, and
// what was said of void ones.
func (s *stand) commits(from int) (commits []committedCut, void []string, err error) {
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
			void = append(void, fmt.Sprintf("epoch %d: %s", e.Epoch, e.Error))
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
	lag, err := t.lag(n)
	if err == nil && lag > 0 {
		err = fmt.Errorf("write %d of %d is not there", t.arrived+1, len(n.records))
	}
	return err
}

// lagOf puts the load on a file system that is copied to another one in some
// way.
func lagOf(ctx context.Context, l lagging, lasting time.Duration, rate float64) (s sampled, wrote float64, err error) {
	for _, disk := range []string{rawDisk, ebsDisk} {
		if err := rig.Do("mkfs.ext4", "-q", "-F", "-b", "4096", disk, fmt.Sprint(lagBytes/4096)); err != nil {
			return s, 0, err
		}
	}
	unmount, err := mounted(map[string]string{rawDisk: lagSource, ebsDisk: lagTarget})
	if err != nil {
		return s, 0, err
	}
	defer func() { err = errors.Join(err, unmount()) }()
	n := &numbered{dir: lagSource, pages: lagFilePages}
	if err := n.prepare(); err != nil {
		return s, 0, err
	}
	if err := rig.Do("rsync", "-a", lagSource+"/", lagTarget+"/"); err != nil {
		return s, 0, err
	}
	unix.Sync()
	stop, err := l.start(ctx)
	if err != nil {
		return s, 0, err
	}
	defer func() { err = errors.Join(err, stop()) }()
	sampling, end := context.WithCancel(ctx)
	defer end()
	done := make(chan error, 1)
	go func() {
		var err error
		s, err = (&target{dir: lagTarget}).sample(sampling, n)
		done <- err
	}()
	began := time.Now()
	err = n.write(ctx, lasting, rate)
	took := time.Since(began).Seconds()
	end()
	return s, float64(n.bytes) / took, errors.Join(err, <-done)
}

// lsyncd runs it with a configuration.
func lsyncd(config string) (stop func() error, err error) {
	const path, log = "/run/lsyncd.lua", "/run/lsyncd.log"
	if err := os.WriteFile(path, []byte("settings{logfile=\""+log+"\", nodaemon=true}\n"+config+"\n"), 0o600); err != nil {
		return nil, err
	}
	os.Remove(log)
	cmd := exec.Command("lsyncd", path)
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	stop = func() error {
		text, _ := os.ReadFile(log)
		select {
		case err := <-ended:
			return fmt.Errorf("lsyncd ended by itself: %v: %s", err, text)
		default:
		}
		for _, pid := range descendants(cmd.Process.Pid) {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		<-ended
		fmt.Printf("lsyncd: %s\n", lastLines(string(text), 3))
		return nil
	}
	// At first it copies all that it finds different, which is nothing.
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		text, _ := os.ReadFile(log)
		switch {
		case strings.Contains(string(text), "finished"):
			return stop, nil
		case time.Now().After(deadline):
			return nil, errors.Join(fmt.Errorf("lsyncd has not begun within a minute: %s", text), stop())
		}
	}
}

func lastLines(text string, count int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-count):], "; ")
}

// rsyncLoop is the cron job, without cron's minute.
func rsyncLoop(ctx context.Context) (stop func() error, err error) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() {
		for {
			began := time.Now()
			cmd := exec.CommandContext(ctx, "rsync", "-a", "--inplace", lagSource+"/", lagTarget+"/")
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
			out, err := cmd.CombinedOutput()
			if ctx.Err() != nil {
				done <- nil
				return
			}
			if err != nil {
				done <- fmt.Errorf("rsync: %w: %s", err, out)
				return
			}
			fmt.Printf("rsync took %v\n", time.Since(began).Round(time.Millisecond))
			select {
			case <-ctx.Done():
			case <-time.After(time.Second - time.Since(began)):
			}
		}
	}()
	return func() error {
		cancel()
		return <-done
	}, nil
}

// lagPicture shows the lag of all of them over time.
var lagPicture = &picture{file: "lag-vs-lsyncd.png", script: func(r report) string {
	f := r.find("lag-vs-lsyncd")
	if f == nil {
		return ""
	}
	// Read back, it is what any JSON is.
	text, err := json.Marshal(f.Extra["lag-per-second"])
	series := map[string][]float64{}
	if err != nil || json.Unmarshal(text, &series) != nil || len(series) == 0 {
		return ""
	}
	var data, plots strings.Builder
	for i, name := range []string{"blockferry", "lsyncd", "lsyncd-tuned", "rsync-loop"} {
		fmt.Fprintf(&data, "$lag%d << END\n", i)
		for second, lag := range series[name] {
			fmt.Fprintf(&data, "%d %g\n", second, max(lag, 0.01))
		}
		data.WriteString("END\n")
		fmt.Fprintf(&plots, "$lag%d using 1:2 with lines lw 2 title %s, ", i, quoted(name))
	}
	return data.String() + "set title 'Age of the oldest write that is not on the copy'\nset logscale y\nset xlabel 'seconds'\nset ylabel 'lag, seconds'\nset key outside right\nplot " + plots.String() + "\n"
}}
