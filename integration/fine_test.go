package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/cmd/blockferry/status"
)

const (
	fineBlocks = 50
	// fineStride puts each write into an era block of its own.
	fineStride = 128 << 10
)

// A volume on a mapper with fine tracking: what is sent is what was written, to
// 4 KiB, and not compared; the era narrows what the agent, or the whole machine,
// can't tell any more after its death. Pins that are gone stand for a restart of
// the machine.
func checkFineTracking(t *testing.T, ssd, ebs string) {
	c := newCLI(t, onlyOnSync(ssd, ebs, oddVolumeBytes))
	c.must(t, "create", "--discard-my-data")
	c.start(t)
	up := func(what string) string {
		return c.await(t, what, time.Minute, func(v status.Volume) bool { return v.Up }).Path
	}
	path := up("up")
	c.syncAndSettle(t, ebs)
	c.syncAndSettle(t, ebs)
	// write changes blocks and gets them sent; it returns what the log said meanwhile.
	write := func(first int64) string {
		from := len(c.logText(t))
		scatter(t, path, first)
		c.syncAndSettle(t, ebs)
		return c.logText(t)[from:]
	}
	exact := 0
	for n := range int64(4) {
		log := write(n * 4096)
		marked, compared, sent := committedEpochs(log)
		if strings.Contains(log, "fine tracking has a gap") {
			t.Logf("a gap, that was told: marked %v, compared %v, sent %v", marked, compared, sent)
			continue
		}
		if len(marked) != 1 || marked[0] != fineBlocks*4096 || compared[0] != 0 || sent[0] != fineBlocks*4096 {
			t.Errorf("%d blocks were written; marked %v, compared %v, sent %v:\n%s", fineBlocks, marked, compared, sent, log)
		}
		exact++
	}
	if exact == 0 {
		t.Error("there was a gap each time")
	}
	c.must(t, "verify")

	// The agent dies; what is written before the next is not lost.
	_ = c.stop(t, syscall.SIGKILL)
	scatter(t, path, 5*4096)
	from := len(c.logText(t))
	c.start(t)
	up("up after the agent's death")
	c.syncAndSettle(t, ebs)
	log := c.logText(t)[from:]
	if !strings.Contains(log, "fine tracking goes on") || !strings.Contains(log, "plan=\"incremental") {
		t.Errorf("after the agent's death:\n%s", log)
	}
	c.must(t, "verify")

	// The marks of BPF die with the machine, the era's do not.
	scatter(t, path, 6*4096)
	c.syncAndSettle(t, ebs) // most likely not with an era of its own
	scatter(t, path, 7*4096)
	_ = c.stop(t, syscall.SIGKILL)
	pins, err := filepath.Glob("/sys/fs/bpf/blockferry/*")
	if err != nil || len(pins) != 1 {
		t.Fatalf("pinned: %v, %v", pins, err)
	}
	if err := os.RemoveAll(pins[0]); err != nil {
		t.Fatal(err)
	}
	scatter(t, path, 8*4096)
	from = len(c.logText(t))
	c.start(t)
	up("up without the fine marks")
	c.syncAndSettle(t, ebs)
	log = c.logText(t)[from:]
	marked, _, sent := committedEpochs(log)
	if !strings.Contains(log, `plan="incremental`) || len(sent) == 0 || sent[0] < 2*fineBlocks*4096 || sent[0] > 4*fineBlocks*4096 || marked[0] < 16*sent[0]/4 {
		t.Errorf("without the fine marks: marked %v, sent %v:\n%s", marked, sent, log)
	}
	c.must(t, "verify")
	c.must(t, "down")
	if pins, err := filepath.Glob("/sys/fs/bpf/blockferry/*"); err != nil || len(pins) != 0 {
		t.Errorf("still pinned after down: %v, %v", pins, err)
	}
}

// committedEpochs is what an agent's log says of the epochs that were committed,
// in bytes.
func committedEpochs(log string) (marked, compared, sent []int64) {
	for _, m := range regexp.MustCompile(`msg="epoch committed".*MarkedBytes:(\d+) .*ComparedBytes:(\d+) SentBytes:(\d+) `).FindAllStringSubmatch(log, -1) {
		for i, into := range []*[]int64{&marked, &compared, &sent} {
			n, _ := strconv.ParseInt(m[i+1], 10, 64)
			*into = append(*into, n)
		}
	}
	return marked, compared, sent
}

// scatter writes noise to blocks far from each other.
func scatter(t *testing.T, path string, first int64) {
	t.Helper()
	file, err := os.OpenFile(path, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	block := alignedBuffer(4096)
	defer unix.Munmap(block)
	copy(block, fmt.Sprintf("%d %d", first, time.Now().UnixNano()))
	for i := range int64(fineBlocks) {
		copy(block[64:], strconv.FormatInt(i, 10))
		if _, err := file.WriteAt(block, first+i*fineStride); err != nil {
			t.Fatal(err)
		}
	}
}
