package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/cmd/blockferry/status"
	"blockferry/integration/load"
	"blockferry/integration/rig"
)

const (
	ssdDisk = "/dev/ubda" // below the mapped device 'ssd', so that it can fail
	ebsDisk = "/dev/ubdb"
	ssd     = "/dev/mapper/ssd"
	volume  = "/dev/mapper/data"
	folder  = "/mnt/data"

	configuration = `volumes:
  data:
    device: ` + ssd + `
    size: 640MiB
    interval: 1s
    replicas:
      ebs:
        device: ` + ebsDisk + `
        compression: s2
`
	// clockSlack is what may lie between a cut and the time noted for it.
	clockSlack = 300 * time.Millisecond
)

// demo is the state of one showing.
type demo struct {
	rig    rig.Rig
	log    bytes.Buffer // the agent's
	ledger *load.Ledger
	load   *load.Load
	cutAt  map[uint64]time.Duration // of each epoch seen in a status, by the ledger's clock
}

func say(format string, args ...any) { fmt.Printf(format+"\n", args...) }

func head(text string) { say("\n== %s", text) }

// show runs in the guest.
func show(ctx context.Context) (err error) {
	d := &demo{
		rig:   rig.Rig{Binary: os.Getenv(binaryVar), Config: "/run/blockferry/demo.yaml"},
		cutAt: map[uint64]time.Duration{},
	}
	defer func() {
		if err != nil {
			say("\nThe agent's log ends with:\n%s", lastLines(d.log.String(), 25))
		}
	}()
	seconds, err := strconv.Atoi(os.Getenv(secondsVar))
	if err != nil {
		return err
	}
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

func ssdTable(target string) string { return fmt.Sprintf("0 %d %s", ssdBytes/512, target) }

func (d *demo) setUp(ctx context.Context) error {
	if err := rig.Do("dmsetup", "create", "ssd", "--table", ssdTable("linear "+ssdDisk+" 0")); err != nil {
		return err
	}
	if err := d.rig.Configure(configuration); err != nil {
		return err
	}
	say("%s", strings.TrimSpace(configuration))
	if err := d.rig.Run(ctx, "create", "data"); err != nil {
		return err
	}
	if err := d.rig.StartAgent(ctx, &d.log); err != nil {
		return err
	}
	if err := rig.AwaitFile(volume, 20*time.Second); err != nil {
		return err
	}
	if err := rig.Do("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", volume); err != nil {
		return err
	}
	if err := mount(); err != nil {
		return err
	}
	return d.rig.Await(ctx, "replicated for the first time", time.Minute, func(v status.Volume) bool {
		return len(v.Replicas) == 1 && v.Replicas[0].Position != nil && v.Replicas[0].Disk == "UpToDate"
	})
}

func mount() error {
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(volume, folder, "ext4", 0, ""); err != nil {
		return fmt.Errorf("mount %s: %w", volume, err)
	}
	return nil
}

// writeUntilWiped lets the writers run, wipes the SSD under them, and returns
// when that was, by the ledger's clock.
func (d *demo) writeUntilWiped(ctx context.Context, seconds int) (time.Duration, error) {
	loadCtx, stop := context.WithCancel(ctx)
	defer stop()
	d.ledger = load.NewLedger()
	d.load = &load.Load{Dir: folder, Ledger: d.ledger}
	if err := d.load.Start(loadCtx); err != nil {
		return 0, err
	}
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for d.ledger.Now() < time.Duration(seconds)*time.Second {
		<-ticker.C
		if err := d.showLag(ctx); err != nil {
			return 0, err
		}
	}
	// From the first moment on nothing more becomes durable: the error table
	// stands before the disk is zeroed.
	if err := rig.SwapTable("ssd", ssdTable("error")); err != nil {
		return 0, err
	}
	wiped := d.ledger.Now()
	if err := rig.Zero(ssdDisk, ssdBytes); err != nil {
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
	if err := unix.Unmount(folder, 0); err != nil {
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
	return epoch, rig.AwaitFile(volume, 20*time.Second)
}

// restart does to blockferry what a restart of the machine does: the agent is
// killed, no device of the volume is left, and the agent starts anew. The disk
// it finds is a new one. It returns the epoch that the replica holds.
func (d *demo) restart(ctx context.Context) (uint64, error) {
	d.rig.KillAgent()
	for _, name := range []string{"data", "data-snap", "data-era", "data-base", "data-cow", "data-meta", "data-data"} { // from the top down
		if rig.Do("dmsetup", "info", name) != nil {
			continue // which inner ones there are depends on when the disk was lost
		}
		if err := rig.Do("dmsetup", "remove", "--force", name); err != nil {
			return 0, err
		}
	}
	if err := rig.SwapTable("ssd", ssdTable("linear "+ssdDisk+" 0")); err != nil {
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
	if err := mount(); err != nil { // replays ext4's journal
		return err
	}
	found, err := load.ReadBack(folder)
	if err != nil {
		return err
	}
	if err := unix.Unmount(folder, 0); err != nil {
		return fmt.Errorf("unmount: %w", err)
	}
	if out, err := exec.CommandContext(ctx, "e2fsck", "-fn", volume).CombinedOutput(); err != nil {
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
