package volume

import "testing"

func TestSnapshotStatus(t *testing.T) {
	for status, want := range map[string]bool{"16/4096 0": true, "0/32760 0 ": true, "Invalid": false, "Overflow": false,
		"Merge failed": false, "Unknown": false, "": false, " ": false, "4096": false} {
		if got := snapshotWhole(status); got != want {
			t.Errorf("'%s': %v", status, got)
		}
	}
}

func TestEraStatus(t *testing.T) {
	s, err := parseEraStatus("8 17/1279 2 23")
	if err != nil || s != (eraStatus{17, 1279, 2, 23}) {
		t.Errorf("%+v, %v", s, err)
	}
	if s, err := parseEraStatus("8 17/1279 2 -"); err != nil || s.snapshot != 0 {
		t.Errorf("%+v, %v", s, err)
	}
	for _, bad := range []string{"Error", "Fail", "", "8 17/1279 2", "8 17 2 -", "8 17/1279 x -", "8 17/1279 2 0", "8 17/1279 2 x"} {
		if s, err := parseEraStatus(bad); err == nil {
			t.Errorf("'%s' was taken: %+v", bad, s)
		}
	}
}

func TestCheckKernel(t *testing.T) {
	for release, fit := range map[string]bool{"6.1.176": true, "5.12.0-rc1": true, "5.11.22": false, "4.19.0-amd64": false, "5.12": true, "x": false} {
		if err := CheckKernel(release, false); (err == nil) != fit {
			t.Errorf("%s: %v", release, err)
		}
	}
	if err := CheckKernel("4.19.0", true); err != nil {
		t.Error(err)
	}
}
