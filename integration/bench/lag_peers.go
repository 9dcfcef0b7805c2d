package main

import (
	"context"
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
	rsyncInALoop,
}

var rsyncInALoop = lagging{"rsync-loop", "rsync -a --inplace, again as soon as it is done, but not more than once a second", rsyncLoop}

// lagOf puts the load on a file system that is copied to another one in some
// way.
func (st *stand) lagOf(ctx context.Context, l lagging, mixed bool, lasting time.Duration, rate float64) (s sampled, wrote float64, err error) {
	from, to := st.disks[2], st.disks[1]
	for _, disk := range []string{from, to} {
		if err := rig.Do("mkfs.ext4", "-q", "-F", "-b", "4096", disk, fmt.Sprint(lagBytes/4096)); err != nil {
			return s, 0, err
		}
	}
	unmount, err := mounted(map[string]string{from: lagSource, to: lagTarget})
	if err != nil {
		return s, 0, err
	}
	defer func() { err = errors.Join(err, unmount()) }()
	n := &numbered{dir: lagSource, pages: lagFilePages, mixed: mixed}
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
