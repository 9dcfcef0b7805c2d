package integration

import (
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/cmd/blockferry/status"
)

// Helpers of the tests that break things under the built binary.

// faultConfig is a volume of size bytes with one replica. extra are more lines
// of the volume, replica more lines of the replica, each with its indent.
func faultConfig(ssd, ebs string, size int64, extra, replica string) string {
	return fmt.Sprintf("volumes:\n  data:\n    device: %s\n    size: %d\n    interval: 500ms\n%s    replicas:\n      ebs:\n        device: %s\n%s",
		ssd, size, extra, ebs, replica)
}

// noise fills a part of a device with what does not compress.
func noise(t *testing.T, device string, offset, length int64, seed byte) {
	t.Helper()
	file, err := os.OpenFile(device, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	buffer := alignedBuffer(1 << 20)
	defer unix.Munmap(buffer)
	source := rand.NewChaCha8([32]byte{seed})
	for end := offset + length; offset < end; offset += int64(len(buffer)) {
		source.Read(buffer)
		if _, err := file.WriteAt(buffer[:min(int64(len(buffer)), end-offset)], offset); err != nil {
			t.Fatal(err)
		}
	}
}

// editBlock changes one block of 4 KiB of a disk or a file.
func editBlock(t *testing.T, path string, at int64, change func(block []byte)) {
	t.Helper()
	file, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	block := alignedBuffer(4096)
	defer unix.Munmap(block)
	if _, err := file.ReadAt(block, at); err != nil {
		t.Fatal(err)
	}
	change(block)
	if _, err := file.WriteAt(block, at); err != nil {
		t.Fatal(err)
	}
}

// flipBit changes one bit of a byte.
func flipBit(t *testing.T, path string, at int64) {
	t.Helper()
	editBlock(t, path, at&^4095, func(b []byte) { b[at&4095] ^= 0x10 })
}

// awaitLog waits until the agents have said a word after the first from bytes of
// their log.
func (c *cli) awaitLog(t *testing.T, from int, word string, limit time.Duration) {
	t.Helper()
	for deadline := time.Now().Add(limit); !strings.Contains(c.logText(t)[from:], word); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no '%s' in the agent's log within %v", word, limit)
		}
	}
}

// epochBytes sums up a counter of the committed epochs in an agent's log.
func epochBytes(t *testing.T, log, counter string) (sum uint64) {
	t.Helper()
	for _, match := range regexp.MustCompile(`epoch committed.*\b`+counter+`:(\d+)`).FindAllStringSubmatch(log, -1) {
		n, err := strconv.ParseUint(match[1], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		sum += n
	}
	return sum
}

// incremental checks that in a stretch of an agent's log nothing was copied in
// full nor compared in full, and something was replicated.
func incremental(t *testing.T, what, log string) {
	t.Helper()
	full, compared, others := plans(log, "full"), plans(log, "compare"), plans(log, "incremental")
	if full != 0 || compared != 0 || others == 0 {
		t.Errorf("%s: %d full copies, %d comparisons, %d incremental epochs", what, full, compared, others)
	}
}

// writtenBytes is what was written to a mapped device since it was made.
func writtenBytes(t *testing.T, name string) uint64 {
	t.Helper()
	ctl := mapper(t)
	info, err := ctl.Info(name)
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%s/stat", info.Dev()))
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.ParseUint(strings.Fields(string(content))[6], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n * sector
}

// says awaits a status in which the first replica's reason and advice, or the
// volume's, hold all the words.
func (c *cli) says(t *testing.T, limit time.Duration, words ...string) status.Volume {
	t.Helper()
	v := c.await(t, "saying "+strings.Join(words, ", "), limit, func(v status.Volume) bool {
		text := v.Reason + "\n" + v.Advice
		for _, r := range v.Replicas {
			text += "\n" + r.Name + " " + r.Reason + "\n" + r.Advice
		}
		for _, w := range words {
			if !strings.Contains(text, w) {
				return false
			}
		}
		return true
	})
	for _, r := range v.Replicas {
		if r.Reason != "" {
			t.Logf("SAID %s: %s | to do: %s", r.Name, r.Reason, r.Advice)
		}
	}
	if v.Reason != "" {
		t.Logf("SAID %s: %s | to do: %s", v.Name, v.Reason, v.Advice)
	}
	return v
}
