package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// picture shows one or more figures. It is drawn by gnuplot from what is kept of them.
type picture struct {
	file string
	// script is what gnuplot is given, but for the output; "" while there is
	// nothing to show.
	script func(r report) string
}

// draw writes the picture into a folder, if there is something to show.
func (p *picture) draw(ctx context.Context, dir string, r report) error {
	script := p.script(r)
	if script == "" {
		return nil
	}
	cmd := exec.CommandContext(ctx, "gnuplot")
	cmd.Stdin = strings.NewReader(fmt.Sprintf("set terminal pngcairo size 900,480 font 'sans,10'\nset output %s\nset grid\n%s", quoted(filepath.Join(dir, p.file)), script))
	if out, err := cmd.CombinedOutput(); err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			return fmt.Errorf("%s is drawn by gnuplot: install the package gnuplot-nox", p.file)
		}
		return fmt.Errorf("%s: gnuplot: %w: %s", p.file, err, out)
	}
	return nil
}

// quoted is a text as gnuplot takes it, with nothing in it interpreted.
func quoted(text string) string { return "'" + strings.ReplaceAll(text, "'", "''") + "'" }

// find is a figure's kept result, nil if there is none.
func (r report) find(figure string) *result {
	for i := range r.Figures {
		if r.Figures[i].Figure == figure {
			return &r.Figures[i]
		}
	}
	return nil
}

// row is one of the figure's rows, nil if there is none.
func (r *result) row(name string) *row {
	if r == nil {
		return nil
	}
	for i := range r.Rows {
		if r.Rows[i].Name == name {
			return &r.Rows[i]
		}
	}
	return nil
}

// ratios shows each ratio of a figure, of those whose names end so, with the smallest and
// largest of its runs.
func ratios(figure, title, suffix string) *picture {
	return &picture{file: figure + ".png", script: func(r report) string {
		f := r.find(figure)
		if f == nil {
			return ""
		}
		var data strings.Builder
		n := 0
		for _, row := range f.Rows {
			if row.Theirs == nil || !strings.HasSuffix(row.Name, suffix) {
				continue
			}
			n++
			fmt.Fprintf(&data, "%d %g %g %g \"%s\"\n", -n, row.Median, slices.Min(row.Values), slices.Max(row.Values), row.Name)
		}
		if n == 0 {
			return ""
		}
		return fmt.Sprintf("$rows << END\n%sEND\nset title %s noenhanced\nset logscale x\nset yrange [%d:0]\nset ytics noenhanced\nset key off\n"+
			"set arrow from 1, graph 0 to 1, graph 1 nohead lw 2 lc rgb '#999999'\n"+
			"plot $rows using 2:1:3:4:yticlabels(5) with xerrorbars pt 7 lw 2 lc rgb '#0060ad'\n", data.String(), quoted(title), -n-1)
	}}
}

// planPicture shows how planning grows with the volume.
var planPicture = &picture{file: "plan.png", script: func(r report) string {
	panels := []struct{ row, label string }{{"seconds", "seconds"}, {"metadata", "metadata read, MiB"}, {"memory", "peak memory, MiB"}}
	var data, plots strings.Builder
	for _, panel := range panels {
		fmt.Fprintf(&plots, "set title %s\nplot ", quoted(panel.label))
		for i, part := range []struct{ name, title string }{{"0.01%", "0.01 % changed"}, {"1%", "1 % changed"}} {
			block := fmt.Sprintf("$%s%d", panel.row, i)
			fmt.Fprintf(&data, "%s << END\n", block)
			for _, tib := range planSizes {
				if row := r.find(fmt.Sprintf("plan-%dtib", tib)).row(part.name + "/" + panel.row); row != nil {
					fmt.Fprintf(&data, "%d %g %g %g\n", tib, row.Median, slices.Min(row.Values), slices.Max(row.Values))
				}
			}
			data.WriteString("END\n")
			fmt.Fprintf(&plots, "%s using 1:2:3:4 with yerrorlines pt 7 lw 2 title %s, ", block, quoted(part.title))
		}
		plots.WriteString("\n")
	}
	return data.String() + "set logscale xy\nset xtics (1, 4, 16)\nset xrange [0.8:20]\nset xlabel 'volume, TiB'\nset key bottom right\nset multiplot layout 1,3\n" +
		plots.String() + "unset multiplot\n"
}}
