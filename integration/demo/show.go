package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/cmd/blockferry/status"
	"blockferry/integration/load"
	"blockferry/integration/rig"
)

const (
	// clockSlack is what may lie between a cut and the time noted for it.
	clockSlack = 300 * time.Millisecond
	// keptWithin is how much longer the writers write, at most, until the replica has a
	// cut with some of it: on a busy machine a cut may be given up, and made anew.
	keptWithin = time.Minute
)

// stage is the machine that the demo is shown on.
type stage interface {
	// configuration is blockferry's there.
	configuration() string
	// device is what the application uses, folder where it is mounted.
	device() string
	folder() string
	// raise ends with a file system, mounted, that is replicated.
	raise(ctx context.Context, d *demo) error
	// lose takes the SSD away under load. From its first moment on nothing more
	// becomes durable; lost is called then.
	lose(d *demo, lost func()) error
	// replace ends what a restart of the machine ends, and puts a new, empty SSD
	// in the lost one's place.
	replace(d *demo) error
}

// demo is the state of one showing.
type demo struct {
	stage
	rig    rig.Rig
	log    bytes.Buffer // the agent's
	ledger *load.Ledger
	load   *load.Load
	cutAt  map[uint64]time.Duration // of each epoch seen in a status, by the ledger's clock
	wrote  time.Duration            // when durable writes were seen first, by the ledger's clock; 0: not yet
	kept   bool                     // the replica has a cut from after that
}

func say(format string, args ...any) { fmt.Printf(format+"\n", args...) }

func head(text string) { say("\n== %s", text) }

// show is the whole demo.
func show(ctx context.Context, on stage, r rig.Rig, seconds int) (err error) {
	d := &demo{stage: on, rig: r, cutAt: map[uint64]time.Duration{}}
	defer func() {
		err = errors.Join(err, d.rig.StopAgent())
		if err != nil {
			say("\nThe agent's log ends with:\n%s", lastLines(d.log.String(), 25))
		}
	}()
	head("An SSD and a slower disk; blockferry keeps the SSD's volume on both")
	if err := d.setUp(ctx); err != nil {
		return err
	}
	head(fmt.Sprintf("%d writers on ext4, each write made durable; one line a second", load.Writers))
	wiped, err := d.writeUntilWiped(ctx, seconds)
	if err != nil {
		return err
	}
	head("The machine restarts with a new, empty SSD; restore it")
	restored, err := d.restore(ctx)
	if err != nil {
		return err
	}
	head("Check the file system and compare every file with what was durable")
	return d.compare(ctx, wiped, restored)
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

func (d *demo) setUp(ctx context.Context) error {
	if err := d.rig.Configure(d.configuration()); err != nil {
		return err
	}
	say("%s", strings.TrimSpace(d.configuration()))
	if err := d.raise(ctx, d); err != nil {
		return err
	}
	return d.rig.Await(ctx, "replicated for the first time", time.Minute, func(v status.Volume) bool {
		return len(v.Replicas) == 1 && v.Replicas[0].Position != nil && v.Replicas[0].Disk == "UpToDate"
	})
}

func makeFileSystem(device string) error {
	return rig.Do("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", device)
}

func (d *demo) mount() error {
	if err := os.MkdirAll(d.folder(), 0o755); err != nil {
		return err
	}
	if err := unix.Mount(d.device(), d.folder(), "ext4", 0, ""); err != nil {
		return fmt.Errorf("mount %s: %w", d.device(), err)
	}
	return nil
}

// writeUntilWiped lets the writers run, wipes the SSD under them, and returns
// when that was, by the ledger's clock.
func (d *demo) writeUntilWiped(ctx context.Context, seconds int) (time.Duration, error) {
	loadCtx, stop := context.WithCancel(ctx)
	defer stop()
	d.ledger = load.NewLedger()
	d.load = &load.Load{Dir: d.folder(), Ledger: d.ledger}
	if err := d.load.Start(loadCtx); err != nil {
		return 0, err
	}
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for written := time.Duration(seconds) * time.Second; d.ledger.Now() < written || !d.kept; {
		if d.ledger.Now() > written+keptWithin {
			return 0, fmt.Errorf("the replica has no cut of what was written within %v", written+keptWithin)
		}
		<-ticker.C
		if err := d.showLag(ctx); err != nil {
			return 0, err
		}
	}
	var wiped time.Duration
	if err := d.lose(d, func() { wiped = d.ledger.Now() }); err != nil {
		return 0, err
	}
	records, bytes := d.ledger.Totals()
	say("%5.1fs  the SSD is gone: every access fails, all of it is zero. %d durable writes, %d MiB, so far", wiped.Seconds(), records, bytes>>20)
	failure := make(chan error, 1)
	go func() { failure <- d.load.Wait() }()
	select {
	case err := <-failure:
		if err == nil {
			return 0, errors.New("the writers did not notice that their disk is gone")
		}
		say("        the application sees: %v", err)
	case <-time.After(30 * time.Second):
		return 0, errors.New("the writers hang instead of getting an error from the missing disk")
	}
	return wiped, nil
}

// showLag prints a line of what status says, and notes when its cuts were.
func (d *demo) showLag(ctx context.Context) error {
	document, err := d.rig.Status(ctx)
	if err != nil {
		return err
	}
	if len(document.Volumes) != 1 || len(document.Volumes[0].Replicas) != 1 {
		return fmt.Errorf("status knows other volumes or replicas than were configured: %+v", document)
	}
	v, now := document.Volumes[0], d.ledger.Now()
	records, bytes := d.ledger.Totals()
	if records > 0 && d.wrote == 0 {
		d.wrote = now
	}
	line := fmt.Sprintf("%5.1fs  %6d writes %5d MiB", now.Seconds(), records, bytes>>20)
	if cut := v.LastCut; cut != nil {
		if cut.At != nil {
			d.cutAt[cut.Epoch] = cut.At.Sub(d.ledger.Begun)
		}
		if cut.StalledSeconds != nil {
			line += fmt.Sprintf("  cut %d stalled %.0f ms", cut.Epoch, *cut.StalledSeconds*1000)
		}
	}
	r := v.Replicas[0]
	if r.Position != nil {
		line += fmt.Sprintf("  ebs has %d", r.Position.Epoch)
		for epoch, at := range d.cutAt {
			d.kept = d.kept || d.wrote > 0 && at > d.wrote+clockSlack && epoch <= r.Position.Epoch
		}
	}
	if r.BehindSeconds != nil {
		line += fmt.Sprintf(", behind %.1f s", *r.BehindSeconds)
	}
	if r.BehindBytes != nil {
		line += fmt.Sprintf(" %.1f MiB", float64(*r.BehindBytes)/(1<<20))
	}
	if r.Reason != "" {
		line += "  (" + r.Reason + ")"
	}
	say("%s", line)
	return nil
}

// restore puts a working, empty disk in the SSD's place, has blockferry fill
// it, and returns the epoch that came back.
func (d *demo) restore(ctx context.Context) (uint64, error) {
	if err := unix.Unmount(d.folder(), 0); err != nil {
		return 0, fmt.Errorf("unmount: %w", err)
	}
	epoch, err := d.restart(ctx)
	if err != nil {
		return 0, err
	}
	began := time.Now()
	cmd := d.rig.Command(ctx, "restore", "data")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("blockferry restore: %w", err)
	}
	say("restored in %.1f s", time.Since(began).Seconds())
	return epoch, rig.AwaitFile(d.device(), 20*time.Second)
}

// restart does to blockferry what a restart of the machine does: the agent is
// killed, no device of the volume is left, and the agent starts anew. The disk
// it finds is a new one. It returns the epoch that the replica holds.
func (d *demo) restart(ctx context.Context) (uint64, error) {
	d.rig.KillAgent()
	if err := d.replace(d); err != nil {
		return 0, err
	}
	if err := d.rig.StartAgent(ctx, &d.log); err != nil {
		return 0, err
	}
	var epoch uint64
	err := d.rig.Await(ctx, "recognised as blank", 30*time.Second, func(v status.Volume) bool {
		if v.Disk != "Diskless" || len(v.Replicas) != 1 || v.Replicas[0].Position == nil {
			return false
		}
		epoch = v.Replicas[0].Position.Epoch
		return true
	})
	return epoch, err
}

// compare judges the restored file system.
func (d *demo) compare(ctx context.Context, wiped time.Duration, epoch uint64) error {
	if err := d.mount(); err != nil { // replays ext4's journal
		return err
	}
	found, err := load.ReadBack(d.folder())
	if err != nil {
		return err
	}
	if err := unix.Unmount(d.folder(), 0); err != nil {
		return fmt.Errorf("unmount: %w", err)
	}
	if out, err := exec.CommandContext(ctx, "e2fsck", "-fn", d.device()).CombinedOutput(); err != nil {
		return fmt.Errorf("e2fsck -fn: %w\n%s", err, out)
	}
	say("e2fsck -fn: clean")
	m, err := d.ledger.Judge(found)
	if err != nil {
		return err
	}
	if m.Held == 0 {
		return errors.New("nothing that was written came back")
	}
	// A cut that no line above showed can't be held against its time.
	cut, known := d.cutAt[epoch]
	if known && (cut+clockSlack < m.After || cut-clockSlack > m.Before) {
		return fmt.Errorf("epoch %d was cut at %.2f s, but its image is from between %.2f and %.2f s",
			epoch, cut.Seconds(), m.After.Seconds(), m.Before.Seconds())
	}
	say("%d places hold a durable write, none torn; all is as it was at one instant, %.2f s", m.Held, m.After.Seconds())
	say("demo: OK: wiped at %.1f s, restored to epoch %d, e2fsck clean, nothing differs; lost: the last %.1f s (%d writes)",
		wiped.Seconds(), epoch, (wiped - m.After).Seconds(), m.Lost)
	return nil
}
