package integration

import (
	"bytes"
	"encoding/binary"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"blockferry/integration/uml"
)

// The harness is what every other test here trusts.

func TestHarnessGuestHasDeviceMapper(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 3 << 20}, {Size: 5<<20 + 512}}}, func(t *testing.T) {
		targets := run(t, "dmsetup", "targets")
		for _, want := range []string{"era", "snapshot-origin", "linear"} {
			if !strings.Contains(targets, want) {
				t.Errorf("no target %s among:\n%s", want, targets)
			}
		}
		if got := sectors(t, ubd(1)); got != (5<<20+512)/512 {
			t.Errorf("disk b has %d sectors", got)
		}
		if os.Getuid() != 0 || os.Getpid() == 1 {
			t.Errorf("uid %d, pid %d", os.Getuid(), os.Getpid())
		}
		if _, err := os.Stat(uml.GuestPath("/etc/passwd")); err != nil {
			t.Error(err)
		}
	})
}

func TestHarnessJudge(t *testing.T) {
	h := history{Seed: 7, Size: 5<<20 + 1536, MaxBytes: 300 << 10}
	const writes = 700
	at := imagesOf(h)
	image := at(writes)
	v, err := judgeImage(bytes.NewReader(image), h)
	if err != nil || v.K > writes || v.Latest < writes || v.Partial {
		t.Fatalf("a whole image: %+v, %v", v, err)
	}
	if v, err := judgeImage(bytes.NewReader(make([]byte, h.Size)), h); err != nil || v.K != 0 {
		t.Errorf("an empty image: %+v, %v", v, err)
	}
	for k := uint64(1); k <= writes; k += 23 {
		if v, err := judgeImage(bytes.NewReader(at(k)), h); err != nil || v.K > k || v.Latest < k {
			t.Errorf("the image after write %d: %+v, %v", k, v, err)
		}
	}

	// Each way to damage it must be seen.
	lost := 0
	for k := uint64(writes - 59); k < writes; k++ { // a write that is missing though later ones are there
		op, before := h.op(k), at(k-1)
		torn := bytes.Clone(image)
		copy(torn[op.Offset:op.Offset+op.Length], before[op.Offset:op.Offset+op.Length])
		later := false // what later writes put there belongs there
		for next := k + 1; next <= writes; next++ {
			o := h.op(next)
			later = later || o.Offset < op.Offset+op.Length && op.Offset < o.Offset+o.Length
		}
		if later || bytes.Equal(torn, image) {
			continue
		}
		lost++
		if v, err := judgeImage(bytes.NewReader(torn), h); err == nil {
			t.Errorf("write %d of %d is missing (%+v), judged whole: %+v", k, writes, op, v)
		}
	}
	if lost < 10 {
		t.Errorf("only %d lost writes were tried", lost)
	}
	for at := int64(0); at < h.Size; at += 277 * sector {
		if allZero(image[at : at+sector]) {
			continue
		}
		for name, damage := range map[string]func([]byte){
			"a flipped bit": func(b []byte) { b[300] ^= 4 },
			"zeros":         func(b []byte) { clear(b) },
			"another place": func(b []byte) { h.fillSector(b, binary.LittleEndian.Uint64(b[8:]), at/sector+1) },
			"an old write":  func(b []byte) { h.fillSector(b, 1, at/sector) },
			"another seed":  func(b []byte) { history{Seed: 8}.fillSector(b, binary.LittleEndian.Uint64(b[8:]), at/sector) },
			"a future write": func(b []byte) {
				h.fillSector(b, binary.LittleEndian.Uint64(b[8:])+writes, at/sector)
			},
		} {
			torn := bytes.Clone(image)
			damage(torn[at : at+sector])
			if v, err := judgeImage(bytes.NewReader(torn), h); err == nil {
				t.Errorf("sector %d has %s, judged whole: %+v", at/sector, name, v)
			}
		}
	}
}

func TestHarnessJudgeKnowsAWriteInProgress(t *testing.T) {
	h := history{Seed: 7, Size: 8 << 20}
	at := imagesOf(h)
	small, large := 0, 0
	for k := uint64(300); k <= 400; k++ {
		op := h.op(k)
		image, after := at(k-1), at(k)
		if op.Length < 2*sector || bytes.Equal(image[op.Offset+sector:op.Offset+op.Length], after[op.Offset+sector:op.Offset+op.Length]) ||
			bytes.Equal(image[op.Offset:op.Offset+sector], after[op.Offset:op.Offset+sector]) {
			continue
		}
		copy(image[op.Offset:op.Offset+sector], after[op.Offset:])
		v, err := judgeImage(bytes.NewReader(image), h)
		if op.Length > 4096 {
			large++
			if err != nil || v.K > k-1 || v.Latest < k-1 {
				t.Errorf("write %d (%+v) in progress: %+v, %v", k, op, v, err)
			}
		} else {
			small++
			if err == nil {
				t.Errorf("half of write %d (%+v) judged whole: %+v", k, op, v)
			}
		}
	}
	if small < 5 || large < 5 {
		t.Errorf("tried only %d small and %d large writes", small, large)
	}
}

// imagesOf makes a function that returns the image after write k, a fresh
// copy each time. Asking in ascending order is cheap.
func imagesOf(h history) func(k uint64) []byte {
	image, done := make([]byte, h.Size), uint64(0)
	return func(k uint64) []byte {
		if k < done {
			image, done = make([]byte, h.Size), 0
		}
		for ; done < k; done++ {
			op := h.op(done + 1)
			h.fill(image[op.Offset:], done+1, op)
		}
		return bytes.Clone(image)
	}
}

func TestHarnessWriterOnARealDisk(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 33<<20 + 512}}, Modules: []string{"loop"}}, func(t *testing.T) {
		h := history{Seed: 3, Size: sectors(t, ubd(0)) * sector}
		w := startWriter(t, ubd(0), h, 1)
		w.awaitWrites(t, 300)
		mid := w.acked()
		if mid < 300 || w.issued() < mid {
			t.Errorf("acked %d, issued %d", mid, w.issued())
		}
		k := w.stop(t)
		judgeDevice(t, ubd(0), h, k, k)
		w = startWriter(t, ubd(0), h, k+1) // the history goes on
		w.awaitWrites(t, 100)
		k = w.stop(t)
		judgeDevice(t, ubd(0), h, k, k)
	})
}

func TestHarnessFsckSeesDamage(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 64 << 20}, {Size: 320 << 20}}, Modules: []string{"loop"}}, func(t *testing.T) {
		for i, kind := range []string{"ext4", "xfs"} {
			mkfs(t, kind, ubd(i))
			dir := mustMount(t, kind, ubd(i), "")
			run(t, "cp", "-r", "/etc/init.d", dir)
			mustUnmount(t, dir)
			fsck(t, kind, ubd(i))
			disk, err := os.OpenFile(ubd(i), os.O_RDWR|unix.O_DIRECT, 0)
			if err != nil {
				t.Fatal(err)
			}
			// Damage behind the superblock: group descriptors and bitmaps of
			// ext4, the allocation group's btrees of XFS.
			garbage := alignedBuffer(64 << 10)
			for j := range garbage {
				garbage[j] = byte(j * 7)
			}
			if _, err := disk.WriteAt(garbage, 4096); err != nil {
				t.Fatal(err)
			}
			disk.Close()
			if out, err := checkCopy(t, kind, ubd(i), sectors(t, ubd(i))*sector); err == nil {
				t.Errorf("damage to %s was not seen:\n%s", kind, out)
			}
		}
	})
}

func TestHarnessReboot(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 1 << 20}}}, func(t *testing.T) {
		h := history{Seed: 5, Size: 1 << 20}
		if uml.Boot() == 0 {
			w := startWriter(t, ubd(0), h, 1)
			w.awaitWrites(t, 50)
			w.stop(t)
			t.Fatal(uml.Reboot())
		}
		judgeDevice(t, ubd(0), h, 50, 1e6)
		if uml.Boot() != 1 {
			t.Errorf("boot %d", uml.Boot())
		}
	})
}

// The judge of how a replica came back takes only plans of that one, and a comparison
// only where tracking was said to be lost.
func TestHarnessPlanned(t *testing.T) {
	line := func(replica, plan string) string {
		return `time=1 level=INFO msg="replica connected" volume=data replica=` + replica + ` position=1/2 plan="` + plan + ` (replica at 1/2)"` + "\n"
	}
	const (
		known  = "incremental: the replica holds an earlier cut and what changed since is known"
		losing = "compare: the replica holds an earlier cut and what changed since is not known"
		said   = `level=WARN msg="epoch failed" error="what changed since epoch 4 is not known"` + "\n"
	)
	for name, c := range map[string]struct {
		log      string
		lost, ok bool
	}{
		"what changed":               {line("zone-b", known), false, true},
		"nothing":                    {line("zone-b", "nothing: both hold the same cut"), false, true},
		"a full copy":                {line("zone-b", "full: the replica was never synced"), false, false},
		"one of two":                 {line("zone-b", known) + line("zone-b", "full: the replica was never synced"), false, false},
		"a comparison":               {line("zone-b", losing), false, false},
		"a comparison for losses":    {said + line("zone-b", losing), true, true},
		"another comparison":         {said + line("zone-b", "compare: the replica's content is not what it last committed"), false, false},
		"refused":                    {line("zone-b", "refuse: the replica is ahead of the primary"), false, false},
		"nobody":                     {said, false, false},
		"another replica, full":      {line("ebs", "full: the replica was never synced") + line("zone-b", known), false, true},
		"another replica alone":      {line("ebs", known), false, false},
		"one that is named alike":    {line("zone-bc", known), false, false},
		"no word of a plan at all":   {`msg="replica connected" replica=zone-b ` + "\n", false, false},
		"a plan before it connected": {`msg="plan" replica=zone-b plan="` + known + "\"\n", false, false},
	} {
		if lost, err := planned(c.log, "zone-b"); lost != c.lost || (err == nil) != c.ok {
			t.Errorf("%s: lost %v, %v", name, lost, err)
		}
	}
}
