package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

const (
	reportJSON = "benchmarks.json"
	reportPage = "benchmarks.md"
)

// report is what is kept: the last result of each figure.
type report struct {
	Machine machine  `json:"machine"`
	Figures []result `json:"figures"`
}

// machine is where it was measured; the guest has one CPU of it.
type machine struct {
	CPU     string `json:"cpu"`
	Cores   int    `json:"cores"`
	Memory  string `json:"memory"`
	Kernel  string `json:"kernel"`
	Go      string `json:"go"`
	Storage string `json:"storage"` // what the guest's disks are files on
}

func thisMachine() machine {
	m := machine{CPU: "unknown", Cores: runtime.NumCPU(), Memory: "unknown", Kernel: kernelRelease(), Go: runtime.Version(), Storage: "files in memory (tmpfs)"}
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		m.CPU = field(string(text), "model name", m.CPU)
	}
	if text, err := os.ReadFile("/proc/meminfo"); err == nil {
		var kib int64
		if _, err := fmt.Sscan(field(string(text), "MemTotal", ""), &kib); err == nil {
			m.Memory = fmt.Sprintf("%d GiB", (kib+1<<19)>>20)
		}
	}
	if _, err := os.Stat("/dev/shm"); err != nil {
		m.Storage = "files in " + os.TempDir()
	}
	return m
}

// hostLoad is the average of the last minute.
func hostLoad() (load float64) {
	text, err := os.ReadFile("/proc/loadavg")
	if err == nil {
		_, err = fmt.Sscan(string(text), &load)
	}
	if err != nil {
		return 0
	}
	return load
}

// field is the first value of a key in lines of 'key : value'.
func field(text, key, otherwise string) string {
	for line := range strings.Lines(text) {
		if k, v, found := strings.Cut(line, ":"); found && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v)
		}
	}
	return otherwise
}

// keep puts a result in the place of the figure's last one and writes the
// page anew.
func keep(ctx context.Context, dir string, r result) error {
	kept, err := readReport(dir)
	if err != nil {
		return err
	}
	kept.Machine = thisMachine()
	kept.Figures = slices.DeleteFunc(kept.Figures, func(old result) bool { return old.Figure == r.Figure || figureIndex(old.Figure) < 0 })
	kept.Figures = append(kept.Figures, r)
	slices.SortFunc(kept.Figures, func(a, b result) int { return figureIndex(a.Figure) - figureIndex(b.Figure) })
	text, err := json.MarshalIndent(kept, "", " ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, reportJSON), append(compact(text), '\n'), 0o644); err != nil {
		return err
	}
	return writePage(ctx, dir)
}

// readReport reads what is kept; nothing, if there is none.
func readReport(dir string) (kept report, err error) {
	text, err := os.ReadFile(filepath.Join(dir, reportJSON))
	if errors.Is(err, fs.ErrNotExist) {
		return kept, nil
	}
	if err != nil {
		return kept, err
	}
	return kept, json.Unmarshal(text, &kept)
}

// writePage writes the page and its pictures from what is kept.
func writePage(ctx context.Context, dir string) error {
	kept, err := readReport(dir)
	if err != nil {
		return err
	}
	drawn := map[*picture]bool{}
	for _, r := range kept.Figures {
		i := figureIndex(r.Figure)
		if i < 0 || figures[i].picture == nil || drawn[figures[i].picture] {
			continue
		}
		drawn[figures[i].picture] = true
		if err := figures[i].picture.draw(ctx, dir, kept); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(dir, reportPage), []byte(kept.page()), 0o644)
}

func figureIndex(name string) int {
	return slices.IndexFunc(figures, func(f figure) bool { return f.name == name })
}

// compact puts each list of numbers on one line.
func compact(text []byte) []byte {
	var out strings.Builder
	inList := false
	for line := range strings.Lines(string(text)) {
		trimmed := strings.TrimSpace(line)
		switch {
		case strings.HasSuffix(trimmed, "["):
			inList = true
			out.WriteString(strings.TrimRight(line, "\n"))
			continue
		case inList && strings.HasPrefix(trimmed, "]"):
			inList = false
			out.WriteString(trimmed + "\n")
			continue
		case inList && strings.ContainsAny(trimmed, "{}\""):
			inList = false
			out.WriteString("\n")
		}
		if inList {
			out.WriteString(trimmed)
		} else {
			out.WriteString(line)
		}
	}
	return []byte(out.String())
}

// unreached says so of latencies under a load that a writer did not reach: they are those of
// a writer at its limit. In a row named A-over-B-p50 there are two.
func (r *result) unreached(name string) string {
	of, found := strings.CutSuffix(name, "-p50")
	if !found {
		of, found = strings.CutSuffix(name, "-p99")
	}
	if !found {
		return ""
	}
	load, who := path.Split(of)
	writers := strings.Split(who, "-over-")
	var said []string
	for _, writer := range writers {
		reached := r.row(load + writer + "-rate")
		if reached == nil || reached.Median >= reachedWanted {
			continue
		}
		if len(writers) == 1 {
			writer = "the writer"
		}
		said = append(said, fmt.Sprintf("%s reached %s of what the bare one did", writer, short(reached.Median)))
	}
	if said == nil {
		return ""
	}
	return "; NOT AT THAT RATE: " + strings.Join(said, ", ")
}

// cutsPerRunSuffix is that of notes of how many cuts there were in each run.
const cutsPerRunSuffix = "-cuts-per-run"

// cutsPerRun says how many cuts percentiles are of.
func (r *result) cutsPerRun() string {
	var said []string
	for _, key := range slices.Sorted(maps.Keys(r.Extra)) {
		if name, found := strings.CutSuffix(key, cutsPerRunSuffix); found {
			said = append(said, name+" "+strings.Trim(fmt.Sprint(r.Extra[key]), "[]"))
		}
	}
	if said == nil {
		return ""
	}
	return "\nCuts in each run: " + strings.Join(said, "; ") + ". Of fewer than 100 a 99th percentile is next to the longest.\n"
}

// page is the report for people.
func (r report) page() string {
	var b strings.Builder
	m := r.Machine
	fmt.Fprintf(&b, "# Benchmarks\n\n"+
		"Written by `make bench-report`, which measures everything, or `make bench FIGURE=NAME RECORD=docs`, which measures one figure anew; not edited by hand. "+
		"[The raw numbers](%s) are beside it.\n\n"+
		"Machine: %s, %d cores, %s, Linux %s, %s.\n\n", reportJSON, m.CPU, m.Cores, m.Memory, m.Kernel, m.Go)
	kernels := []string{}
	for _, f := range r.Figures {
		if !f.Native && !f.Debian && !slices.Contains(kernels, f.GuestKernel) {
			kernels = append(kernels, f.GuestKernel)
		}
	}
	fmt.Fprintf(&b, "Measured in a User-Mode Linux guest (Linux %s) with one CPU, whose disks are %s, where a figure does not say otherwise. "+
		"There a system call costs more than elsewhere, disks are as fast as memory, and the clock ticks every 10 ms: absolute values say nothing about real disks, ratios of "+
		"paired runs do, the two sides taking turns. Each row is a median; beside it the smallest and the largest of its runs.\n",
		strings.Join(kernels, ", "), m.Storage)
	var missed []string
	for _, f := range r.Figures {
		known, how := figures[figureIndex(f.Figure)], ""
		if f.Quick {
			how = ", short runs"
		}
		if f.Native {
			how += ", on this machine's own kernel, loop devices over files in memory"
		}
		if f.Debian {
			how += fmt.Sprintf(", on Debian's kernel %s with two CPUs, emulated", f.GuestKernel)
		}
		if f.HostLoad > 0 {
			how += fmt.Sprintf(", on a host with a load of %.1f", f.HostLoad)
		}
		command := "make bench FIGURE=" + f.Figure
		if f.Quick {
			command += " QUICK=1"
		}
		fmt.Fprintf(&b, "\n## %s\n\n%s%s.\n\n`%s` (%s%s, %.0f s)\n\n", f.Figure, strings.ToUpper(known.about[:1]), known.about[1:], command, f.Date, how, f.TookSeconds)
		b.WriteString("| row | median | from | to | runs | wanted | |\n| --- | --- | --- | --- | --- | --- | --- |\n")
		for _, row := range f.Rows {
			unit, verdict := "", ""
			row.Goal = goalOf(f.Figure, row.Name) // what is wanted now, not when it was measured
			if row.Theirs == nil && row.Unit != "" {
				unit = " " + row.Unit
			}
			if row.Goal != nil {
				verdict = "met"
				if !row.Goal.met(row.Median) {
					verdict = "missed"
					missed = append(missed, fmt.Sprintf("- %s, %s: %s%s, wanted %s. %s", f.Figure, row.Name, short(row.Median), unit, row.Goal, why(f.Figure, row.Name)))
				}
			}
			fmt.Fprintf(&b, "| %s: %s%s | %s%s | %s | %s | %d | %s | %s |\n", row.Name, row.What, f.unreached(row.Name), short(row.Median), unit,
				short(slices.Min(row.Values)), short(slices.Max(row.Values)), len(row.Values), row.Goal, verdict)
		}
		b.WriteString(f.cutsPerRun())
		if known.picture != nil && known.picture.script(r) != "" {
			fmt.Fprintf(&b, "\n![%s](%s)\n", known.about, known.picture.file)
		}
		if known.note != "" {
			b.WriteString("\n" + known.note + "\n")
		}
	}
	for _, f := range figures {
		if !slices.ContainsFunc(r.Figures, func(m result) bool { return m.Figure == f.name }) {
			missed = append(missed, fmt.Sprintf("- %s is not measured yet.", f.name))
		}
	}
	b.WriteString("\n## What falls short, and why\n\n")
	if len(missed) == 0 {
		missed = []string{"Nothing."}
	}
	b.WriteString(strings.Join(missed, "\n") + "\n")
	return b.String()
}
