package progress

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

const mib = 1 << 20

// run feeds one update a second and returns what was printed.
func run(terminal bool, feed func(update func(after time.Duration, phase string, done, total int64))) string {
	var out bytes.Buffer
	now := time.Unix(1000, 0)
	p := &Printer{Out: &out, Terminal: terminal, Now: func() time.Time { return now }}
	feed(func(after time.Duration, phase string, done, total int64) {
		now = now.Add(after)
		p.Update(phase, done, total)
	})
	p.Done()
	return out.String()
}

func TestTerminal(t *testing.T) {
	got := run(true, func(u func(time.Duration, string, int64, int64)) {
		u(0, "restore", 0, 100*mib)
		u(time.Second, "restore", 25*mib, 100*mib)
		u(50*time.Millisecond, "restore", 26*mib, 100*mib) // too soon: not drawn
		u(950*time.Millisecond, "restore", 50*mib, 100*mib)
		u(2*time.Second, "restore", 100*mib, 100*mib)
		u(time.Second, "verify", 0, 100*mib)
	})
	want := "\rrestore [                        ] 0% 0B of 100MiB" +
		"\rrestore [======                  ] 25% 25MiB of 100MiB 25MiB/s ETA 3.0s" +
		"\rrestore [============            ] 50% 50MiB of 100MiB 25MiB/s ETA 2.0s" +
		"\rrestore [========================] 100% 100MiB of 100MiB 25MiB/s       \n" +
		"\rverify [                        ] 0% 0B of 100MiB\n"
	if got != want {
		t.Errorf("got\n%q\nwant\n%q", got, want)
	}
}

func TestPlainLines(t *testing.T) {
	got := run(false, func(u func(time.Duration, string, int64, int64)) {
		for i := range int64(13) {
			u(time.Second, "restore", i*10*mib, 120*mib)
		}
	})
	want := "restore 0% 0B of 120MiB\n" +
		"restore 41% 50MiB of 120MiB 10MiB/s ETA 7.0s\n" +
		"restore 83% 100MiB of 120MiB 10MiB/s ETA 2.0s\n" +
		"restore 100% 120MiB of 120MiB 10MiB/s\n"
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// The rate follows the present, it is not the mean since the start, and a
// long run keeps few marks.
func TestRateFollows(t *testing.T) {
	now := time.Unix(0, 0)
	p := &Printer{Out: &bytes.Buffer{}, Now: func() time.Time { return now }}
	done := int64(0)
	for range 6000 { // a minute at 100 MiB/s in steps of 10 ms
		now, done = now.Add(10*time.Millisecond), done+mib
		p.Update("restore", done, 1<<50)
	}
	if len(p.rate.marks) > maxRateMarks+8 {
		t.Errorf("%d marks kept", len(p.rate.marks))
	}
	for range 1500 { // 15 s at 10 MiB/s
		now, done = now.Add(10*time.Millisecond), done+mib/10
		p.Update("restore", done, 1<<50)
	}
	if r := p.rate.PerSecond(); r < 9*mib || r > 12*mib {
		t.Errorf("rate %d, about %d expected", r, 10*mib)
	}
	p.Update("restore", 0, 1<<50)
	if r := p.rate.PerSecond(); r != 0 {
		t.Errorf("rate %d after it began again", r)
	}
}

func TestAlmostDoneIsNotDone(t *testing.T) {
	got := run(false, func(u func(time.Duration, string, int64, int64)) { u(0, "x", 999_999, 1_000_000) })
	if !strings.Contains(got, "99%") {
		t.Error(got)
	}
}

func TestDurations(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 0: "0ms", 850 * time.Millisecond: "850ms", 4200 * time.Millisecond: "4.2s", 59 * time.Second: "59s",
		185 * time.Second: "3m05s", 127 * time.Minute: "2h07m", 76 * time.Hour: "3d04h"} {
		if got := FormatDuration(d); got != want {
			t.Errorf("%d: %s, want %s", d, got, want)
		}
	}
}
