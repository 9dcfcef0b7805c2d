package dm

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// answer is a buffer as the kernel leaves it.
func answer(t testing.TB, targets uint32, data []byte) []byte {
	t.Helper()
	b, err := encodeHeader("vol-era", "BLOCKFERRY-1-era", 0, len(data))
	if err != nil {
		t.Fatal(err)
	}
	copy(b[headerBytes:], data)
	order.PutUint32(b[offsetTargets:], targets)
	return b
}

// kernelTable lays targets out as the kernel answers: `next` counts from the
// data's start.
func kernelTable(t testing.TB, targets []Target) []byte {
	t.Helper()
	var data []byte
	for _, target := range targets {
		one, err := encodeTargets([]Target{target})
		if err != nil {
			t.Fatal(err)
		}
		order.PutUint32(one[20:], uint32(len(data)+len(one)))
		data = append(data, one...)
	}
	return answer(t, uint32(len(targets)), data)
}

func TestTableSurvivesTheWire(t *testing.T) {
	want := []Target{
		{0, 2048, "linear", "254:0 2048"},
		{2048, 1 << 40, "era", "254:1 254:2 128"},
		{4096, 8, "error", ""},
	}
	got, err := decodeTargets(kernelTable(t, want))
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("got %v, %v; want %v", got, err, want)
	}
	// A load counts `next` from each target itself, in multiples of 8.
	data, err := encodeTargets(want)
	if err != nil {
		t.Fatal(err)
	}
	at := 0
	for i, target := range want {
		if at%8 != 0 || text(data[at+24:at+specBytes]) != target.Type || text(data[at+specBytes:]) != target.Params {
			t.Fatalf("target %d is not at %d", i, at)
		}
		at += int(order.Uint32(data[at+20:]))
	}
	if at != len(data) {
		t.Fatalf("targets end at %d of %d", at, len(data))
	}
}

func TestHeaderSurvivesTheWire(t *testing.T) {
	b := answer(t, 0, nil)
	order.PutUint32(b[offsetFlags:], unix.DM_SUSPEND_FLAG|unix.DM_ACTIVE_PRESENT_FLAG)
	order.PutUint32(b[offsetOpen:], 3)
	order.PutUint64(b[offsetDev:], unix.Mkdev(254, 70000))
	got, err := decodeInfo(b)
	want := Info{Exists: true, Name: "vol-era", UUID: "BLOCKFERRY-1-era", Major: 254, Minor: 70000,
		OpenCount: 3, Suspended: true, HasActive: true}
	if err != nil || got != want {
		t.Fatalf("got %+v, %v; want %+v", got, err, want)
	}
	if got.Dev() != "254:70000" {
		t.Fatalf("got %s", got.Dev())
	}
}

func TestRefusesWhatTheKernelWouldCut(t *testing.T) {
	long := strings.Repeat("x", unix.DM_NAME_LEN)
	for _, name := range []string{long, "a/b", "a\x00b"} {
		if _, err := encodeHeader(name, "", 0, 0); err == nil {
			t.Errorf("name %q was taken", name)
		}
	}
	if _, err := encodeHeader("a", long+"y", 0, 0); err == nil {
		t.Error("a uuid that is too long was taken")
	}
	if _, err := encodeTargets([]Target{{Type: "sixteen-letters-"}}); err == nil {
		t.Error("a type that is too long was taken")
	}
	if _, err := encodeMessage(0, ""); err == nil {
		t.Error("an empty message was taken")
	}
	if _, err := (&Control{}).SuspendRequest("a", SuspendOptions{LockFS: true}); err == nil {
		t.Error("a freeze without flush was taken; the kernel would silently not freeze")
	}
}

func TestLists(t *testing.T) {
	entry := func(head int, next uint32, name string) []byte {
		b := make([]byte, head, 64)
		if head == 12 {
			order.PutUint64(b, 1)
			order.PutUint32(b[8:], next)
		} else {
			order.PutUint32(b, next)
			order.PutUint32(b[4:], 1)
			order.PutUint32(b[8:], 2)
			order.PutUint32(b[12:], 3)
		}
		return append(append(b, name...), 0)
	}
	names, err := decodeNames(answer(t, 0, slices.Concat(entry(12, 16, "one"), entry(12, 0, "two"))))
	if err != nil || !slices.Equal(names, []string{"one", "two"}) {
		t.Fatalf("got %v, %v", names, err)
	}
	names, err = decodeNames(answer(t, 0, make([]byte, 12)))
	if err != nil || len(names) != 0 {
		t.Fatalf("no device: got %v, %v", names, err)
	}
	versions, err := decodeVersions(answer(t, 0, slices.Concat(entry(16, 20, "era"), entry(16, 0, "linear"))))
	if err != nil || versions["era"] != [3]uint32{1, 2, 3} || len(versions) != 2 {
		t.Fatalf("got %v, %v", versions, err)
	}
}

// FuzzDecode: nothing the kernel could answer panics, and no count makes the
// decoder take more than the buffer holds.
func FuzzDecode(f *testing.F) {
	f.Add(kernelTable(f, []Target{{0, 8, "linear", "1:1 0"}, {8, 8, "error", ""}}))
	f.Add(answer(f, 3, []byte("short")))
	f.Fuzz(func(t *testing.T, b []byte) {
		targets, err := decodeTargets(b)
		if err == nil && len(targets)*specBytes > len(b) {
			t.Fatalf("%d targets in %d bytes", len(targets), len(b))
		}
		decodeInfo(b)
		decodeNames(b)
		decodeVersions(b)
	})
}
