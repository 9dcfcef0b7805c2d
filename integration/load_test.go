package integration

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/integration/load"
)

// The demo's judge on real crash images of ext4, made without blockferry: a
// frozen snapshot taken under load must be accepted; a copy made while writes
// go on must not.
func TestHarnessLedgerOnRealImages(t *testing.T) {
	const size = 400 << 20
	inGuest(t, guest{Memory: "1800M", Disks: []disk{{Size: size}, {Size: size}, {Size: size}}, Timeout: 4 * time.Minute}, func(t *testing.T) {
		whole := dmCreate(t, "base", fmt.Sprintf("0 %d snapshot-origin %s", size/512, ubd(0)))
		mkfs(t, "ext4", whole)
		dir := mustMount(t, "ext4", whole, "")
		l := &load.Load{Dir: dir, Ledger: load.NewLedger()}
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		if err := l.Start(ctx); err != nil {
			t.Fatal(err)
		}
		time.Sleep(4 * time.Second)

		earliest := l.Ledger.Now()
		run(t, "dmsetup", "suspend", "--noflush", "--nolockfs", "base")
		run(t, "dmsetup", "create", "snap", "--table", fmt.Sprintf("0 %d snapshot %s %s N 16", size/512, ubd(0), ubd(1)))
		// Loaded again: an origin knows how to split writes only from then on.
		run(t, "dmsetup", "load", "base", "--table", fmt.Sprintf("0 %d snapshot-origin %s", size/512, ubd(0)))
		run(t, "dmsetup", "resume", "base")
		latest := l.Ledger.Now()

		torn := copyWhileWritten(t, whole, ubd(2), func() { time.Sleep(20 * time.Millisecond) })
		stop()
		if err := l.Wait(); err != nil {
			t.Fatal(err)
		}
		if err := unix.Unmount(dir, 0); err != nil {
			t.Fatal(err)
		}

		m, err := judgeFileSystem(t, l, "/dev/mapper/snap")
		if err != nil || m.Held == 0 {
			t.Fatalf("a frozen snapshot: %+v, %v", m, err)
		}
		if m.After > latest || m.Before < earliest {
			t.Errorf("cut between %v and %v, judged between %v and %v", earliest, latest, m.After, m.Before)
		}
		t.Logf("snapshot cut between %v and %v, judged between %v and %v, %d held", earliest, latest, m.After, m.Before, m.Held)
		m, err = judgeFileSystem(t, l, torn)
		if err == nil {
			t.Errorf("a copy made while writes went on was judged whole: %+v", m)
		}
		t.Logf("the copy made under load: %v", err)
		run(t, "dmsetup", "remove", "--retry", "snap")
	})
}

// copyWhileWritten copies a device that is in use, slowly: what nobody should
// call a backup.
func copyWhileWritten(t *testing.T, from, to string, between func()) string {
	t.Helper()
	out, err := os.OpenFile(to, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	pieces := 0
	err = readDirect(from, func(offset int64, piece []byte) error {
		if pieces++; pieces%16 == 0 {
			between()
		}
		_, err := out.WriteAt(piece, offset)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return to
}

// judgeFileSystem mounts an image, which replays its journal, and judges it.
func judgeFileSystem(t *testing.T, l *load.Load, device string) (load.Moment, error) {
	t.Helper()
	dir, err := os.MkdirTemp("/mnt", "")
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(device, dir, "ext4", 0, ""); err != nil {
		return load.Moment{}, fmt.Errorf("mount: %w", err)
	}
	found, err := load.ReadBack(dir)
	mustUnmount(t, dir)
	if err != nil {
		return load.Moment{}, err
	}
	if out, err := tryRun(t, "e2fsck", "-fn", device); err != nil {
		return load.Moment{}, fmt.Errorf("e2fsck: %w: %s", err, strings.TrimSpace(out))
	}
	return l.Ledger.Judge(found)
}
