package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// usage is what a piece of work took.
type usage struct {
	seconds float64
	cpu     float64 // seconds of the whole machine, its kernel's threads included
	own     float64 // seconds of the processes themselves
	rss     float64 // MiB, the processes' peaks together
}

// watch measures work that processes do: a process and what descends from it.
type watch struct {
	began time.Time
	busy  float64
	root  int
	stop  chan struct{}
	done  chan struct{}
	peaks map[int]float64 // MiB, by process
	own   map[int]float64 // seconds, by process
}

// watchProcess begins; all that the process did before counts for its own part.
func watchProcess(pid int, busyBefore float64) *watch {
	w := &watch{began: time.Now(), busy: busyBefore, root: pid, stop: make(chan struct{}), done: make(chan struct{}),
		peaks: map[int]float64{}, own: map[int]float64{}}
	go func() {
		defer close(w.done)
		ticker := time.NewTicker(100 * time.Millisecond)
		defer ticker.Stop()
		for {
			w.look()
			select {
			case <-w.stop:
				return
			case <-ticker.C:
			}
		}
	}()
	return w
}

// look remembers what each process has taken by now.
func (w *watch) look() {
	for _, pid := range descendants(w.root) {
		if _, peak, err := memory(pid); err == nil {
			w.peaks[pid] = peak
		}
		if seconds, err := processCPU(pid); err == nil {
			w.own[pid] = seconds
		}
	}
}

// end looks once more, while the processes are still there, and sums up.
func (w *watch) end() (usage, error) {
	busy, err := machineBusy()
	u := usage{seconds: time.Since(w.began).Seconds(), cpu: busy - w.busy}
	close(w.stop)
	<-w.done
	w.look()
	for pid := range w.peaks {
		u.rss += w.peaks[pid]
		u.own += w.own[pid]
	}
	return u, err
}

// descendants are a process and all that it started and they did.
func descendants(root int) []int {
	children := map[int][]int{}
	paths, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range paths {
		fields, err := statFields(path)
		if err != nil || len(fields) < 2 {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		parent, _ := strconv.Atoi(fields[1])
		children[parent] = append(children[parent], pid)
	}
	found := []int{root}
	for i := 0; i < len(found); i++ {
		found = append(found, children[found[i]]...)
	}
	return found
}

// statFields are those after the name of /proc/PID/stat, state first.
func statFields(path string) ([]string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:])), nil
}

// clockTicks is the unit of times in /proc on every Linux of today.
const clockTicks = 100

// processCPU is what a process used, without its children, in seconds.
func processCPU(pid int) (float64, error) {
	fields, err := statFields(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	if len(fields) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat has too few fields", pid)
	}
	var user, system float64
	if _, err := fmt.Sscan(fields[11]+" "+fields[12], &user, &system); err != nil {
		return 0, err
	}
	return (user + system) / clockTicks, nil
}

// machineBusy is how long the machine's CPUs were not idle since it booted, in
// seconds.
func machineBusy() (float64, error) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := strings.Cut(string(text), "\n")
	var t [8]float64
	var name string
	if _, err := fmt.Sscan(line, &name, &t[0], &t[1], &t[2], &t[3], &t[4], &t[5], &t[6], &t[7]); err != nil {
		return 0, fmt.Errorf("/proc/stat: %w: %s", err, line)
	}
	return (t[0] + t[1] + t[2] + t[5] + t[6]) / clockTicks, nil // not idle, not waiting, not stolen
}

// measureCommand runs a command to its end, and then what makes its work
// durable.
func measureCommand(ctx context.Context, durable func() error, name string, args ...string) (usage, error) {
	before, err := machineBusy()
	if err != nil {
		return usage{}, err
	}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var complaint strings.Builder
	cmd.Stdout, cmd.Stderr = &complaint, &complaint
	if err := cmd.Start(); err != nil {
		return usage{}, err
	}
	w := watchProcess(cmd.Process.Pid, before)
	err = cmd.Wait()
	if err == nil && durable != nil {
		err = durable()
	}
	u, failed := w.end()
	if err != nil {
		return u, fmt.Errorf("%v: %w: %s", cmd.Args, err, strings.TrimSpace(complaint.String()))
	}
	// What it and its children used in all is known exactly now.
	u.own = (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds()
	return u, failed
}

// flush makes what was written to a device durable.
func flush(device string) func() error {
	return func() error {
		file, err := os.OpenFile(device, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		return errors.Join(file.Sync(), file.Close())
	}
}

// dropCaches forgets what is cached of devices and files.
func dropCaches() error {
	syscall.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}
