// Package progress shows how far something is: a bar that is redrawn on a
// terminal, plain lines elsewhere.
package progress

import (
	"fmt"
	"io"
	"strings"
	"time"

	"blockferry/cmd/blockferry/config"
)

const (
	barWidth     = 24
	redrawEvery  = 200 * time.Millisecond
	plainEvery   = 5 * time.Second
	rateOver     = 10 * time.Second
	maxRateMarks = 64
)

// Printer prints progress. Not for several goroutines.
type Printer struct {
	Out      io.Writer
	Terminal bool
	// Now is the clock; tests set it.
	Now func() time.Time

	marks     []mark
	phase     string
	lastPrint time.Time
	lastWidth int
}

// mark is what was done at a moment, in bytes.
type mark struct {
	at    time.Time
	bytes int64
}

// Update tells the present state; it prints when it is time to. A change of
// phase starts the rate anew. A total of 0 means not known.
func (p *Printer) Update(phase string, doneBytes, totalBytes int64) {
	now := p.Now()
	begun := phase != p.phase
	if begun {
		p.endLine()
		p.phase, p.marks = phase, nil
	}
	p.mark(now, doneBytes)
	every := plainEvery
	if p.Terminal {
		every = redrawEvery
	}
	ended := totalBytes > 0 && doneBytes >= totalBytes
	if !begun && !ended && now.Sub(p.lastPrint) < every {
		return
	}
	p.lastPrint = now
	line := p.line(doneBytes, totalBytes)
	if !p.Terminal {
		fmt.Fprintln(p.Out, line)
		return
	}
	pad := max(0, p.lastWidth-len(line))
	fmt.Fprint(p.Out, "\r", line, strings.Repeat(" ", pad))
	p.lastWidth = len(line)
}

// Done ends the display.
func (p *Printer) Done() { p.endLine() }

func (p *Printer) endLine() {
	if p.Terminal && p.lastWidth > 0 {
		fmt.Fprintln(p.Out)
		p.lastWidth = 0
	}
}

// mark remembers enough of the past for a rate over the last seconds.
func (p *Printer) mark(now time.Time, bytes int64) {
	if n := len(p.marks); n > 0 && bytes < p.marks[n-1].bytes {
		p.marks = p.marks[:0] // begun again
	}
	if n := len(p.marks); n > 1 && now.Sub(p.marks[n-2].at) < rateOver/maxRateMarks {
		p.marks = p.marks[:n-1]
	}
	p.marks = append(p.marks, mark{now, bytes})
	for len(p.marks) > 2 && now.Sub(p.marks[1].at) >= rateOver {
		p.marks = p.marks[1:]
	}
}

// rate is bytes per second over the last seconds, 0 when not known.
func (p *Printer) rate() int64 {
	first, last := p.marks[0], p.marks[len(p.marks)-1]
	span := last.at.Sub(first.at).Seconds()
	if span <= 0 {
		return 0
	}
	return int64(float64(last.bytes-first.bytes) / span)
}

func (p *Printer) line(done, total int64) string {
	if total <= 0 {
		return fmt.Sprintf("%s %s%s", p.phase, config.FormatSize(done), p.rateText())
	}
	share := min(1, float64(done)/float64(total))
	s := p.phase + " "
	if p.Terminal {
		filled := int(share * barWidth)
		s += "[" + strings.Repeat("=", filled) + strings.Repeat(" ", barWidth-filled) + "] "
	}
	// Rounded down: 100 % is said only when all is done.
	s += fmt.Sprintf("%d%% %s of %s%s", int(share*100), config.FormatSize(done), config.FormatSize(total), p.rateText())
	if rate := p.rate(); rate > 0 && done < total {
		s += " ETA " + FormatDuration(time.Duration(float64(total-done)/float64(rate)*float64(time.Second)))
	}
	return s
}

func (p *Printer) rateText() string {
	if rate := p.rate(); rate > 0 {
		return " " + config.FormatSize(rate) + "/s"
	}
	return ""
}

// FormatDuration writes a duration for people: 850ms, 4.2s, 3m05s, 2h07m,
// 3d04h.
func FormatDuration(d time.Duration) string {
	switch {
	case d < 0:
		return "0s"
	case d < time.Second:
		return fmt.Sprintf("%dms", d.Milliseconds())
	case d < 10*time.Second:
		return fmt.Sprintf("%.1fs", d.Seconds())
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd%02dh", int(d.Hours())/24, int(d.Hours())%24)
}
