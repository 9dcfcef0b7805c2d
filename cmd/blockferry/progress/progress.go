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
	barWidth    = 24
	redrawEvery = 200 * time.Millisecond
	plainEvery  = 5 * time.Second
)

// Printer prints progress. Not for several goroutines.
type Printer struct {
	Out      io.Writer
	Terminal bool
	// Now is the clock; tests set it.
	Now func() time.Time
	// PlainEvery is how often a line is printed where there is no terminal; 0:
	// every 5 seconds.
	PlainEvery time.Duration

	rate      Rate
	phase     string
	lastPrint time.Time
	lastWidth int
}

// Update tells the present state; it prints when it is time to. A change of
// phase starts the rate anew. A total of 0 means not known.
func (p *Printer) Update(phase string, doneBytes, totalBytes int64) {
	now := p.Now()
	begun := phase != p.phase
	if begun {
		p.endLine()
		p.phase, p.rate = phase, Rate{}
	}
	p.rate.Mark(now, doneBytes)
	ended := totalBytes > 0 && doneBytes >= totalBytes
	if !begun && !ended && !p.due(now) {
		return
	}
	p.show(now, p.line(doneBytes, totalBytes))
}

// Line shows a line of the caller's own, when it is time to.
func (p *Printer) Line(line string) {
	if now := p.Now(); p.due(now) {
		p.show(now, line)
	}
}

// due says whether it is time to print again.
func (p *Printer) due(now time.Time) bool {
	every := plainEvery
	switch {
	case p.Terminal:
		every = redrawEvery
	case p.PlainEvery > 0:
		every = p.PlainEvery
	}
	return now.Sub(p.lastPrint) >= every
}

func (p *Printer) show(now time.Time, line string) {
	p.lastPrint = now
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
	if rate := p.rate.PerSecond(); rate > 0 && done < total {
		s += " ETA " + FormatDuration(time.Duration(float64(total-done)/float64(rate)*float64(time.Second)))
	}
	return s
}

func (p *Printer) rateText() string {
	if rate := p.rate.PerSecond(); rate > 0 {
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
