package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"strconv"
	"time"
)

// load is what fio writes to a device.
type load struct {
	pattern   string // fio's rw: randwrite, write
	block     string // of one write
	depth     int    // writes under way at once
	fdatasync bool   // after each write
	rate      int    // writes per second at most; 0: no limit
	lasting   time.Duration
	count     int // writes; 0: as many as there is time for
}

// written is what fio says of a run.
type written struct {
	iops           float64
	bytesPerSecond float64
	p50, p99       float64 // latency of a write in ms, without its fdatasync
}

// fio runs a load over the first size bytes of a device.
func fio(ctx context.Context, device string, size int64, l load) (written, error) {
	engine := "psync"
	if l.depth > 1 {
		engine = "libaio"
	}
	args := []string{"--name=load", "--filename=" + device, "--rw=" + l.pattern, "--bs=" + l.block, "--size=" + strconv.FormatInt(size, 10),
		"--ioengine=" + engine, "--iodepth=" + strconv.Itoa(l.depth), "--direct=1", "--norandommap", "--randrepeat=0", "--thread", "--output-format=json"}
	if l.count > 0 {
		args = append(args, "--number_ios="+strconv.Itoa(l.count))
	} else {
		args = append(args, "--time_based", fmt.Sprintf("--runtime=%dms", l.lasting.Milliseconds()))
	}
	if l.fdatasync {
		args = append(args, "--fdatasync=1")
	}
	if l.rate > 0 {
		args = append(args, "--rate_iops="+strconv.Itoa(l.rate))
	}
	cmd := exec.CommandContext(ctx, "fio", args...)
	cmd.Dir = "/run"
	out, err := cmd.Output()
	if err != nil {
		return written{}, fmt.Errorf("%v: %w: %s", cmd.Args, err, out)
	}
	var said struct {
		Jobs []struct {
			Write struct {
				IOPS    float64 `json:"iops"`
				Bytes   float64 `json:"bw_bytes"`
				Latency struct {
					Percentile map[string]float64 `json:"percentile"` // ns
				} `json:"clat_ns"`
			} `json:"write"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal(out, &said); err != nil {
		return written{}, fmt.Errorf("fio: %w: %s", err, out)
	}
	if len(said.Jobs) != 1 || said.Jobs[0].Write.IOPS == 0 {
		return written{}, fmt.Errorf("fio wrote nothing: %s", out)
	}
	w := said.Jobs[0].Write
	return written{iops: w.IOPS, bytesPerSecond: w.Bytes, p50: w.Latency.Percentile["50.000000"] / 1e6, p99: w.Latency.Percentile["99.000000"] / 1e6}, nil
}
