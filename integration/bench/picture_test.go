package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A figure with a picture shows it on its page, and only once there is
// something to see.
func TestPictures(t *testing.T) {
	some := func(figure string, rows ...row) result {
		m := &measured{result: result{Figure: figure, About: "x"}}
		for _, r := range rows {
			m.add(r)
		}
		return m.result
	}
	full := report{Figures: []result{
		some("first-sync-vs-rsync", row{Name: "rsync-files", Ours: []float64{1, 2}, Theirs: []float64{2, 2}}),
		some("plan-1tib", row{Name: "0.01%/seconds", Ours: []float64{1, 2}}, row{Name: "1%/seconds", Ours: []float64{3}},
			row{Name: "0.01%/metadata", Ours: []float64{1}}, row{Name: "1%/metadata", Ours: []float64{3}},
			row{Name: "0.01%/memory", Ours: []float64{1}}, row{Name: "1%/memory", Ours: []float64{3}}),
		some("lag-vs-lsyncd", row{Name: "blockferry", Ours: []float64{1}}),
		some("lag-natively-4k", row{Name: "blockferry", Ours: []float64{1}}),
		some("tracked-vs-drbd-a", row{Name: "x-over-raw", Ours: []float64{1}, Theirs: []float64{4}}, row{Name: "x-over-drbd-a", Ours: []float64{1}, Theirs: []float64{2}}),
	}}
	inGuest, natively := figures[figureIndex("lag-vs-lsyncd")].picture, figures[figureIndex("lag-natively-4k")].picture
	lag := full.find("lag-vs-lsyncd")
	if inGuest.script(full) != "" || natively.script(full) != "" {
		t.Error("a lag that is not there is drawn")
	}
	lag.Extra = map[string]any{"lag-per-second": map[string][]float64{"blockferry": {1, 2}, "lsyncd": {3, 4}, "lsyncd-tuned": {1, 1}, "rsync-loop": {2, 2}}}
	full.find("lag-natively-4k").Extra = map[string]any{"lag-per-second": map[string][]float64{"blockferry": {5, 6}, "rsync-loop": {7, 8}}}
	for _, want := range []struct{ picture, data string }{
		{"first-sync-vs-rsync.png", `-1 0.75 0.5 1 "rsync-files"`},
		{"tracked-vs-drbd-a.png", "$rows << END\n-1 0.5 0.5 0.5 \"x-over-drbd-a\"\nEND"},
		{"plan.png", "1 1.5 1 2\n"},
		{"lag-vs-lsyncd.png", "0 3\n1 4\n"},
		{"lag-natively-4k.png", "$lag0 << END\n0 5\n1 6\nEND\n"},
		{"lag-natively-4k.png", "$lag3 << END\n0 7\n1 8\nEND\n"},
	} {
		page, drawn := full.page(), ""
		for _, f := range figures {
			if f.picture != nil && f.picture.file == want.picture {
				drawn = f.picture.script(full)
			}
		}
		if !strings.Contains(page, "]("+want.picture+")") || !strings.Contains(drawn, want.data) {
			t.Errorf("%s: on the page %v, drawn from\n%s", want.picture, strings.Contains(page, want.picture), drawn)
		}
	}
	if _, err := exec.LookPath("gnuplot"); err != nil {
		t.Log("not drawn: gnuplot is only installed by make bench")
		return
	}
	for _, p := range []*picture{inGuest, natively, planPicture, figures[figureIndex("first-sync-vs-rsync")].picture} {
		dir := t.TempDir()
		if err := p.draw(t.Context(), dir, full); err != nil {
			t.Error(err)
			continue
		}
		if image, err := os.ReadFile(filepath.Join(dir, p.file)); err != nil || !bytes.HasPrefix(image, []byte("\x89PNG")) {
			t.Errorf("%s is no picture: %v, %d bytes", p.file, err, len(image))
		}
	}
}
